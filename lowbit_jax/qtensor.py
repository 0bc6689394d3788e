"""QTensor: the quantized array, and how it is made."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int32, UInt8

from lowbit_jax import calibrate, packing
from lowbit_jax.blocks import BlockView, pinned
from lowbit_jax.formats import Learned
from lowbit_jax.grid import (
    Range,
    Second,
    coded,
    decoded,
    from_levels,
    scales_of,
    to_levels,
    transposed_scales,
)
from lowbit_jax.spec import Block, QuantSpec


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, eq=False)
class QTensor:
    """A quantized array [..., K, N], or [..., K] with `PerToken`; never holds the dense array.

    Always: dequantize() == (decode(unpack(words)) - zero_point) * expand(float32(scale) *
    global_scale), in float32, rounded once to `dtype`. rank(scale) == rank(array). Immutable;
    q[...] is q. Leading axes may be sliced, stacked or scanned like those of any pytree: `shape`
    follows the words.

    Attributes:
        words: Planes of packed codes, int32 [..., ceil32(K) * width / 32, N] ([..., words, 1] with
            `PerToken`).
        scale: In the dtype of `spec.scale_format`, of shape `spec.scale_shape(shape)`; a QTensor
            [..., N / n, K / k] if `spec.second` quantizes it.
        zero_point: uint8 of the same shape; None if symmetric.
        global_scale: float32, 1 along K and N; None without a second level.
        spec: How the array is quantized.
        k: Length of K, in elements (the words are padded to a multiple of 32).
        dtype: That of the array it was made from, and of `dequantize()`.
        basis: float32, what the values of a `formats.Learned` are made of; None for the others.
        scale_offset: float32, added to scales that are quantized; None without.
    """

    words: tuple[Int32[Array, "..."], ...]
    scale: "Array | QTensor"
    zero_point: UInt8[Array, "..."] | None
    global_scale: Float[Array, "..."] | None
    spec: QuantSpec = dataclasses.field(metadata={"static": True})
    k: int = dataclasses.field(metadata={"static": True})
    dtype: Any = dataclasses.field(metadata={"static": True})
    basis: Float[Array, "..."] | None = None
    scale_offset: Float[Array, "..."] | None = None

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of the array that it stands for."""
        *lead, _, n = self.words[0].shape
        return (*lead, self.k, n) if isinstance(self.spec.granularity, Block) else (*lead, self.k)

    @property
    def ndim(self) -> int:
        """Rank of the array that it stands for."""
        return len(self.shape)

    @property
    def size(self) -> int:
        """Elements of the array that it stands for."""
        return int(np.prod(self.shape))

    @property
    def nbytes(self) -> int:
        """Bytes of words, scales, zero points and learned values, padding included."""
        return sum(int(np.prod(leaf.shape)) * leaf.dtype.itemsize for leaf in jax.tree.leaves(self))

    @property
    def plain_scale(self) -> Array:
        """The scale in its stored dtype. Raises: ValueError: It is quantized itself."""
        if isinstance(self.scale, QTensor):
            raise ValueError(f"{self!r}: its scales are quantized; see `with_one_level`.")
        return self.scale

    @property
    def bits_per_weight(self) -> float:
        """Bits an element takes, with its share of scales, zero points and padding."""
        return self.nbytes * 8 / self.size

    def __getitem__(self, index: Any) -> "QTensor":
        if index is not Ellipsis:
            raise NotImplementedError(
                f"QTensor[{index}]: only q[...] is supported, since codes are packed along K. "
                "Index q.dequantize(), or map over leading axes with jax.tree.map."
            )
        return self

    def __repr__(self) -> str:
        bits = f"{self.bits_per_weight:.3g} bits/element"
        return f"QTensor({self.spec.format.name}, shape={self.shape}, {bits})"

    def codes(self) -> UInt8[Array, "..."]:
        """The codes, uint8 in `[0, 2**bits)`, of the shape of the array."""
        return packing.unpack_planes(self.words, self.spec.bits, self.k).reshape(self.shape)

    def range(self) -> Range:
        """Scales, zero points, global scale and learned values in float32."""
        zero_point = None if self.zero_point is None else self.zero_point.astype(jnp.float32)
        scale, second = self.scale, None
        if isinstance(scale, QTensor):
            assert self.spec.second is not None
            second = Second(scale.range().scale, self.scale_offset)
            scale = scales_of(scale.dequantize(), self.spec.second, second)
        scale = scale.astype(jnp.float32)
        return Range(scale, zero_point, self.global_scale, self.basis, second)

    def dequantize(self, dtype: Any = None) -> Array:
        """The array, computed in float32 and rounded once to `dtype`.

        Args:
            dtype: Default: that of the array it was made from.
        """
        view = BlockView.of(self.shape, self.spec)
        range_ = self.range()
        levels = decoded(view.split(self.codes()), self.spec, range_, view)
        return from_levels(levels, range_, view, jnp.dtype(dtype or self.dtype))


def quantize(
    x: Float[Array, "..."],
    spec: QuantSpec,
    *,
    scale: Array | None = None,
    zero_point: Array | None = None,
    global_scale: Array | None = None,
) -> QTensor:
    """Quantizes an array: nearest, ties to even, saturating; then packs its codes.

    Args:
        x: float array [..., K, N] ([..., K] with `PerToken`).
        spec: How.
        scale: Of shape `spec.scale_shape(x.shape)`; rounded to `spec.scale_format`. Default: absmax
            (asymmetric: min-max).
        zero_point: Integers in `[0, 2**bits)` of the same shape; goes with `scale` for an
            asymmetric spec.
        global_scale: float32, 1 along K and N; goes with `scale` for e4m3 scales.

    Raises:
        ValueError: An axis does not split into groups, a scale of the wrong shape, a zero point
            where none or a missing one where one belongs; or (outside jit) values or scales that
            are not finite.
    """
    x = jnp.asarray(x)
    if not jnp.issubdtype(x.dtype, jnp.floating):
        raise ValueError(f"quantize: needs a float array, not {x.dtype}.")
    if isinstance(spec.format, Learned):
        raise NotImplementedError(
            f"quantize: the values of {spec.format.name} are learned: a quantizer that has them "
            "(TTQ, LQNets) freezes an array, or `encode` with a range that holds their basis."
        )
    _check_finite("the array", x)
    if scale is None:
        if zero_point is not None or global_scale is not None:
            raise ValueError(
                "quantize: zero_point and global_scale go with a scale; give all or none."
            )
        range_ = calibrate.absmax(x, spec) if spec.symmetric else calibrate.minmax(x, spec)
    else:
        range_ = _given_range(x.shape, spec, scale, zero_point, global_scale)
    return encode(x, spec, range_)


def encode(x: Float[Array, "..."], spec: QuantSpec, range_: Range) -> QTensor:
    """`quantize` with a range that is already known to fit: no checks."""
    view = BlockView.of(x.shape, spec)
    codes = view.merge(coded(to_levels(x, spec, range_, view), spec, range_, view))
    if not isinstance(spec.granularity, Block):
        codes = codes[..., None]
    zero_point, second = range_.zero_point, range_.second
    scale: Array | QTensor
    if spec.second is None:
        scale = spec.scale_format.store(range_.scale)
    elif second is None:
        raise ValueError("encode: a range of quantized scales needs its second level.")
    else:
        level = spec.second
        codes_of_scale = transposed_scales(range_.scale, level, second)
        scale = encode(codes_of_scale, level.spec, Range(second.scale))
    return QTensor(
        words=packing.pack_planes(codes, spec.bits, pad_code=spec.format.zero_code),
        scale=scale,
        zero_point=None if zero_point is None else zero_point.astype(jnp.uint8),
        global_scale=range_.global_scale,
        spec=spec,
        k=x.shape[spec.granularity.axis],
        dtype=x.dtype,
        basis=range_.basis,
        scale_offset=None if second is None else second.offset,
    )


def with_one_level(q: QTensor) -> QTensor:
    """The same values and codes with float32 scales in place of quantized ones."""
    if q.spec.second is None:
        return q
    spec = dataclasses.replace(q.spec, second=None)
    return dataclasses.replace(q, scale=q.range().scale, spec=spec, scale_offset=None)


def _given_range(shape, spec, scale, zero_point, global_scale) -> Range:
    expected = spec.scale_shape(shape)
    for name, array in (("scale", scale), ("zero_point", zero_point)):
        if array is not None and jnp.shape(array) != expected:
            raise ValueError(
                f"quantize: {name} has shape {jnp.shape(array)}, the spec gives {expected} "
                f"for an array of shape {tuple(shape)}."
            )
    if (zero_point is not None) == spec.symmetric:
        word = "has no" if spec.symmetric else "needs a"
        raise ValueError(f"quantize: a spec with symmetric={spec.symmetric} {word} zero_point.")
    if (global_scale is not None) != spec.has_global_scale:
        word = "need a" if spec.has_global_scale else "have no"
        raise ValueError(f"quantize: {spec.scale_format.name} scales {word} global_scale.")
    if global_scale is not None:
        axes = -spec.granularity.axis
        one = (*shape[:-axes], *(1,) * axes)
        if jnp.shape(global_scale) != one:
            raise ValueError(
                f"quantize: global_scale has shape {jnp.shape(global_scale)}, an array of shape "
                f"{tuple(shape)} has one of {one}."
            )
        _check_finite("the global_scale", global_scale)
    _check_finite("the scale", scale)
    if zero_point is not None:
        _check_zero_point(zero_point, spec)
    negative = jnp.asarray(scale, jnp.float32) < 0
    # Scale formats round magnitudes; a negative scale (GGUF's Q4_0) keeps its sign.
    magnitude = spec.scale_format.round(jnp.abs(jnp.asarray(scale, jnp.float32)))
    if spec.second is not None:
        if not isinstance(negative, jax.core.Tracer) and bool(negative.any()):
            raise ValueError("quantize: scales that are quantized themselves are not negative.")
        found = calibrate.stored_scale(magnitude, spec)
    else:
        found = Range(pinned(jnp.where(negative, -magnitude, magnitude)))
    return found._replace(
        zero_point=None if zero_point is None else jnp.asarray(zero_point).astype(jnp.float32),
        global_scale=None if global_scale is None else jnp.asarray(global_scale, jnp.float32),
    )


def _check_zero_point(zero_point: Array, spec: QuantSpec) -> None:
    if isinstance(zero_point, jax.core.Tracer):
        return
    values = np.asarray(zero_point, np.float64)
    wrong = ~((values >= 0) & (values < 2**spec.bits) & (values == np.round(values)))
    if wrong.any():
        raise ValueError(
            f"quantize: {int(wrong.sum())} of {wrong.size} zero points are not integers in "
            f"[0, {2**spec.bits}), the first being {values[wrong][0]:g}."
        )


def _check_finite(what: str, x: Array) -> None:
    if isinstance(x, jax.core.Tracer):
        return  # values are not known under jit; pack_model and quantize check outside
    finite = jnp.isfinite(jnp.asarray(x))
    if not bool(finite.all()):
        bad = int(finite.size - finite.sum())
        raise ValueError(
            f"quantize: {what} holds {bad} of {finite.size} values that are NaN or infinite. "
            "Find where they come from before quantizing."
        )
