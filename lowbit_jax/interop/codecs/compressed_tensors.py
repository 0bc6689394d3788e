"""The layouts of compressed-tensors: what vLLM and llm-compressor exchange.

| format | weight | scales |
|---|---|---|
| pack-quantized | weight_packed int32 [N, K * bits / 32], along K | weight_scale [N, G] |
| int-quantized | weight int8 [N, K] | weight_scale [N, G], [N, 1] or [1] |
| float-quantized | weight float8_e4m3fn [N, K] | the same, or [N / size, K / size] |
| nvfp4-pack-quantized | weight_packed uint8 [N, K / 2] | weight_scale e4m3 [N, K / 16], |
| | | weight_global_scale float32 [1], which divides |
| mxfp4-pack-quantized | the same | weight_scale e8m0 in uint8 [N, K / 32] |

Packed integers are stored as value + 2**(bits - 1). Asymmetric ones have weight_zero_point, packed
along N, or int8 where the weight is. `weight_shape` is [N, K]; `weight_g_idx` int32 [K] belongs to
activation order. Until late 2025 words of 3, 5, 6 and 7 bits held `32 // bits` values and some
padding; since then the stream is dense. The number of words tells which, and where it does not the
last bits do: they are 0 in all padded words. Of two e2m1 codes in a byte the even one is the low.
"""

from collections.abc import Mapping
from typing import Final

import ml_dtypes
import numpy as np

from lowbit_jax import formats
from lowbit_jax.interop.codecs.bitstreams import WORD, from_stream, stream_length, to_stream
from lowbit_jax.interop.codecs.integers import (
    grouped,
    permutation_of,
    spec_of_zeros,
    words_as_they_are,
    zeros_of,
)
from lowbit_jax.interop.codecs.parts import (
    Kernel,
    by_shape,
    check_finite,
    codes_of,
    group_size,
    make_qtensor,
    refuse,
    require,
    scale_format_of,
    scale_of,
    stored_scales,
    take,
)
from lowbit_jax.scale_formats import FLOAT16, ScaleFormat
from lowbit_jax.spec import QuantSpec

PACKED, INTEGER, FLOAT = "pack-quantized", "int-quantized", "float-quantized"
FORMATS: Final = (PACKED, INTEGER, FLOAT)  # the others are in `block_floats`
PARTS: Final = (
    "weight",
    "weight_packed",
    "weight_scale",
    "weight_zero_point",
    "weight_shape",
    "weight_g_idx",
)
_BITS: Final = (2, 3, 4, 8)
_NEAREST: Final = "w4a16_g128, w4a16_g128_asym or w8a8"
_E4M3: Final = np.dtype(ml_dtypes.float8_e4m3fn)


def decode(tensors: Mapping[str, np.ndarray], *, format: str, bits: int, where: str) -> Kernel:
    """The kernel in a layer's `PARTS`.

    Args:
        tensors: By their names behind the layer's.
        format: One of `FORMATS`.
        bits: Of one code; float8 has 8.
        where: The layer, for messages.
    Raises:
        ValueError: The tensors do not belong together.
        NotImplementedError: Another width.
    """
    if format == PACKED:
        return _decode_packed(tensors, bits, where)
    weight, scale = take(tensors, "weight", where, 2), take(tensors, "weight_scale", where, 0, 1, 2)
    n, k = weight.shape
    scale = scale.reshape(1, 1) if scale.size == 1 else scale
    granularity = by_shape(k, n, scale.T.shape, where)
    if format == FLOAT:
        require(weight, "weight", where, dtype=_E4M3)
        spec = QuantSpec(
            format=formats.FP8_E4M3,
            granularity=granularity,
            scale_format=scale_format_of(scale, where),
        )
        return Kernel(make_qtensor(weight.view(np.uint8).T, spec, scale.T, where=where))
    require(weight, "weight", where, dtype=np.int8)
    if bits not in _BITS:
        raise NotImplementedError(f"{where}: {bits} bits; known are {list(_BITS)}.")
    half = np.uint8(2 ** (bits - 1))
    zeros = tensors.get("weight_zero_point")
    if zeros is not None:
        require(zeros, "weight_zero_point", where, dtype=np.int8)
        if zeros.size != scale.size:
            raise ValueError(f"{where}: {zeros.size} zero points for {scale.size} scales.")
        zeros = zeros.reshape(scale.shape).view(np.uint8).T + half
    codes = weight.view(np.uint8).T + half
    if codes.max(initial=0) >= 2**bits or (zeros is not None and (zeros >= 2**bits).any()):
        raise ValueError(f"{where}: holds integers beyond {bits} bits.")
    found = spec_of_zeros(zeros, bits, granularity, scale_format_of(scale, where))
    q = make_qtensor(codes, found.spec, scale.T, zero_point=found.zero_point, where=where)
    return Kernel(q)


def is_padded(words: np.ndarray, bits: int, k: int, where: str) -> bool:
    """Whether words int32 [N, W] of `k` codes a row have padding, as the older layout has.

    Raises: ValueError: They hold another number of codes in both.
    """
    dense, padded = stream_length(k, bits), stream_length(k, bits, padded=True)
    if words.shape[1] not in (dense, padded):
        raise ValueError(
            f"{where}: {words.shape[1]} words a row do not hold {k} codes of {bits} bits, which "
            f"take {dense} (or {padded} with padding)."
        )
    if dense != padded:
        return words.shape[1] == padded
    used = WORD // bits * bits
    return used < WORD and not (words.view(np.uint32) >> np.uint32(used)).any()


def _decode_packed(tensors: Mapping[str, np.ndarray], bits: int, where: str) -> Kernel:
    if bits not in _BITS:
        raise NotImplementedError(f"{where}: {bits} bits; known are {list(_BITS)}.")
    packed, scale = (
        take(tensors, "weight_packed", where, 2),
        take(tensors, "weight_scale", where, 2),
    )
    require(packed, "weight_packed", where, dtype=np.int32)
    n, k = shape_of(take(tensors, "weight_shape", where, 1), where)
    if len(packed) != n:
        raise ValueError(f"{where}: weight_packed has {len(packed)} rows, weight_shape says {n}.")
    padded = is_padded(packed, bits, k, where)
    granularity, groups = by_shape(k, n, scale.T.shape, where), scale.shape[1]
    zeros = tensors.get("weight_zero_point")
    if zeros is not None:
        length = stream_length(len(scale), bits, padded=padded)
        require(zeros, "weight_zero_point", where, dtype=np.int32, shape=(length, groups))
        zeros = from_stream(zeros, bits, len(scale), axis=0, padded=padded).T
    check_finite(scale, f"{where}: the scales")
    found = spec_of_zeros(zeros, bits, granularity, scale_format_of(scale, where))
    permutation = permutation_of(tensors.get("weight_g_idx"), k, groups, where)
    if permutation is None:
        q = words_as_they_are(packed.T, found, scale.T, k)
        if q is not None:
            return Kernel(q)
    codes = from_stream(packed, bits, k, axis=1, padded=padded).T
    if permutation is not None:
        codes = codes[permutation]
    q = make_qtensor(codes, found.spec, scale.T, zero_point=found.zero_point, where=where)
    return Kernel(q, permutation)


def shape_of(shape: np.ndarray, where: str) -> tuple[int, int]:
    """(N, K) of `weight_shape`. Raises: ValueError: It is not two lengths."""
    if shape.shape != (2,) or shape.dtype.kind != "i" or not ((shape > 0) & (shape < 2**31)).all():
        raise ValueError(f"{where}: weight_shape is {shape.tolist()}, and not two lengths.")
    return int(shape[0]), int(shape[1])


def encode(
    kernel: Kernel,
    *,
    format: str,
    where: str,
    padded: bool = False,
    scale_format: ScaleFormat = FLOAT16,
) -> dict[str, np.ndarray]:
    """A layer's tensors: the inverse of `decode`.

    Args:
        kernel: Consecutive integers of 2, 3, 4 or 8 bits; `FLOAT`: fp8_e4m3.
        format: One of `FORMATS`.
        where: The layer, for messages.
        padded: The older layout of widths that do not divide 32.
        scale_format: What the scales become.
    Raises:
        NotImplementedError: The format has no such scheme.
        ValueError: A scale that the format of scales does not have.
    """
    q = kernel.qtensor
    scale = stored_scales(scale_of(q), scale_format, where)
    if format == FLOAT:
        if q.spec.format is not formats.FP8_E4M3 or q.spec.scale_format.name in ("e4m3", "e8m0"):
            refuse(q.spec, FLOAT, "it keeps fp8_e4m3 with float scales", _NEAREST)
        return {
            "weight": np.ascontiguousarray(codes_of(q).T).view(_E4M3),
            "weight_scale": _stored_shape(scale, q.shape[1]),
        }
    bits = q.spec.bits
    zeros = zeros_of(q, format, _NEAREST)
    symmetric = q.zero_point is None and bool((zeros == 2 ** (bits - 1)).all())
    if bits not in _BITS:
        refuse(q.spec, format, f"codes have {list(_BITS)} bits", _NEAREST)
    if kernel.input_permutation is not None and format != PACKED:
        refuse(q.spec, format, "it has no activation order", f"the same without it, or {PACKED}")
    if format == INTEGER:
        half = np.uint8(2 ** (bits - 1))
        tensors = {
            "weight": np.ascontiguousarray((codes_of(q).T - half).view(np.int8)),
            "weight_scale": _stored_shape(scale, q.shape[1]),
        }
        if not symmetric:
            signed = (zeros - half).view(np.int8)
            tensors["weight_zero_point"] = _stored_shape(signed, q.shape[1])
        return tensors
    return _encode_packed(
        kernel, grouped(scale, q), None if symmetric else grouped(zeros, q), padded
    )


def _encode_packed(
    kernel: Kernel, scale: np.ndarray, zeros: np.ndarray | None, padded: bool
) -> dict[str, np.ndarray]:
    q = kernel.qtensor
    codes, bits = codes_of(q), q.spec.bits
    tensors: dict[str, np.ndarray] = {}
    if kernel.input_permutation is not None:
        back = np.argsort(kernel.input_permutation)
        codes = codes[back]
        groups = (np.arange(q.k) // group_size(q)).astype(np.int32)
        tensors["weight_g_idx"] = groups[back]
    tensors |= {
        "weight_packed": to_stream(np.ascontiguousarray(codes.T), bits, axis=1, padded=padded),
        "weight_scale": np.ascontiguousarray(scale.T),
        "weight_shape": np.array(q.shape[::-1], np.int64),
    }
    if zeros is not None:
        packed = to_stream(np.ascontiguousarray(zeros.T), bits, axis=0, padded=padded)
        tensors["weight_zero_point"] = packed
    return tensors


def _stored_shape(array: np.ndarray, n: int) -> np.ndarray:
    """Scales as they lie in the file: [N, G], and [1] where one stands for the tensor."""
    return array.reshape(1) if array.size == 1 and n > 1 else np.ascontiguousarray(array.T)
