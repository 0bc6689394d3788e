"""QTensors as qwix's QArrays, whose kernels (tokamax) then take them, and back.

    QArray: (qvalue - zero_point) * scale, scale and zero point broadcast by tiles

Values are the same bit for bit: scales go as float32, for a QArray is dequantized in the type of
its scale, and with a global scale already multiplied in. qwix is an extra (`bench`), imported when
it is asked for.
"""

from typing import Any, Final

import jax.numpy as jnp

from lowbit_jax import formats, packing
from lowbit_jax.formats import Format, IntGrid
from lowbit_jax.grid import effective_scale
from lowbit_jax.qtensor import QTensor
from lowbit_jax.scale_formats import BFLOAT16, FLOAT16, FLOAT32
from lowbit_jax.spec import Block, QuantSpec

_FLOATS: Final[dict[Any, Format]] = {
    jnp.dtype(jnp.float4_e2m1fn): formats.FP4_E2M1,
    jnp.dtype(jnp.float8_e4m3fn): formats.FP8_E4M3,
    jnp.dtype(jnp.float8_e5m2): formats.FP8_E5M2,
}
_INTEGERS: Final = {jnp.dtype(jnp.int4): 4, jnp.dtype(jnp.int8): 8}
_SCALES: Final = {f.dtype: f for f in (FLOAT32, FLOAT16)} | {jnp.dtype(jnp.bfloat16): BFLOAT16}


def to_qarray(q: QTensor) -> Any:
    """The `qwix.QArray` of the same values.

    Integers become int4 or int8; a zero point is shifted with them, into the signed range.

    Raises:
        ImportError: qwix is not installed.
        NotImplementedError: Levels that are neither integers nor a small float of jax.
    """
    import qwix

    fmt, range_ = q.spec.format, q.range()
    levels = fmt.decode(q.codes())
    zero_point = range_.zero_point
    if isinstance(fmt, IntGrid) and float(fmt.low).is_integer():
        dtype = jnp.dtype(jnp.int4 if fmt.bits <= 4 else jnp.int8)
        if not fmt.signed:
            assert zero_point is not None
            half = jnp.float32(2 ** (fmt.bits - 1))
            levels, zero_point = levels - half, (zero_point - half).astype(dtype)
    elif fmt in _FLOATS.values():
        dtype = next(dtype for dtype, other in _FLOATS.items() if other is fmt)
    else:
        known = ["integers", *(other.name for other in _FLOATS.values())]
        raise NotImplementedError(
            f"to_qarray: a QArray has no {fmt.name} (its levels are no integers). Known: {known}."
        )
    return qwix.QArray(
        qvalue=levels.astype(dtype), scale=effective_scale(range_), zero_point=zero_point
    )


def from_qarray(array: Any) -> QTensor:
    """The QTensor of the same values; tiles of the last two axes become its blocks.

    Args:
        array: A `qwix.QArray` [..., K, N] of int4, int8 or a small float, with a float scale.
    Raises:
        ValueError: A rank below 2, or scales and zero points of different shapes.
        NotImplementedError: Another type, or tiles along leading axes.
    """
    *lead, k, n = array.shape if len(array.shape) > 1 else (None, None)
    if k is None or n is None:
        raise ValueError(f"from_qarray: an array of shape {array.shape} is no matrix [..., K, N].")
    dtype, scale = jnp.dtype(array.qvalue.dtype), array.scale
    if dtype not in (*_FLOATS, *_INTEGERS) or jnp.dtype(scale.dtype) not in _SCALES:
        known = [str(d) for d in (*_INTEGERS, *_FLOATS)]
        raise NotImplementedError(
            f"from_qarray: values {dtype} with scales {scale.dtype}; known are {known} with "
            f"{[str(d) for d in _SCALES]}."
        )
    if any(tile not in (1, length) for tile, length in zip(scale.shape[:-2], lead, strict=True)):
        raise NotImplementedError(f"from_qarray: tiles along leading axes, {scale.shape}.")
    shape = (*lead, *scale.shape[-2:])
    asymmetric = array.zero_point is not None
    if asymmetric and array.zero_point.shape != scale.shape:
        raise ValueError(
            f"from_qarray: zero points {array.zero_point.shape} for scales {scale.shape}."
        )
    block = Block(*(None if count == 1 else length // count
                    for length, count in zip((k, n), shape[-2:], strict=True)))  # fmt: skip
    half = jnp.float32(2 ** (_INTEGERS.get(dtype, 0) - 1))
    zero_point = None
    if asymmetric and dtype in _INTEGERS:
        zero_point = jnp.broadcast_to(array.zero_point.astype(jnp.float32) + half, shape)
    elif asymmetric:
        raise NotImplementedError(f"from_qarray: zero points of {dtype}.")
    fmt = _FLOATS.get(dtype) or formats.get(f"{'uint' if asymmetric else 'int'}{_INTEGERS[dtype]}")
    levels = array.qvalue.astype(jnp.float32) + (half if asymmetric else 0)
    spec = QuantSpec(
        format=fmt,
        granularity=block,
        symmetric=not asymmetric,
        scale_format=_SCALES[jnp.dtype(scale.dtype)],
    )
    return QTensor(
        words=packing.pack_planes(fmt.encode(levels), fmt.bits, pad_code=fmt.zero_code),
        scale=jnp.broadcast_to(scale, shape),
        zero_point=None if zero_point is None else zero_point.astype(jnp.uint8),
        global_scale=None,
        spec=spec,
        k=k,
        dtype=jnp.dtype(scale.dtype),
    )
