"""The arithmetic between values and codes, shared by training, checkpoints and kernels."""

from typing import Any, NamedTuple

import jax.numpy as jnp
from jaxtyping import Array, Float

from lowbit_jax.blocks import BlockView, divided, pinned, rounded_cast
from lowbit_jax.formats import Learned
from lowbit_jax.scale_formats import FLOAT32
from lowbit_jax.spec import QuantSpec, SecondLevel


class Second(NamedTuple):
    """What turns the codes of scales into scales: `decode(code) * scale + offset`.

    Attributes:
        scale: float32, of the shape of the scales' scales.
        offset: float32, of `SecondLevel.offset_shape`; None without.
    """

    scale: Float[Array, "..."]
    offset: Float[Array, "..."] | None = None


class Range(NamedTuple):
    """What turns codes into values: `(decode(code) - zero_point) * (scale * global_scale)`.

    Attributes:
        scale: float32 of the spec's scale shape, already rounded to `spec.scale_format`.
        zero_point: The same shape, integers in float32; None if symmetric.
        global_scale: float32, 1 along the axes of the matrix; None without a second level.
        basis: float32, what the values of a `formats.Learned` are made of, in units of the scale;
            None for the others.
        second: Where scales are quantized (`spec.second`), what their codes are read with; `scale`
            holds the values of those codes.
    """

    scale: Float[Array, "..."]
    zero_point: Float[Array, "..."] | None = None
    global_scale: Float[Array, "..."] | None = None
    basis: Float[Array, "..."] | None = None
    second: Second | None = None


def effective_scale(range_: Range) -> Float[Array, "..."]:
    """float32(scale) * global_scale: what values are divided, codes multiplied by."""
    if range_.global_scale is None:
        return range_.scale
    return pinned(range_.scale * range_.global_scale)


def to_levels(x: Array, spec: QuantSpec, range_: Range, view: BlockView) -> Float[Array, "..."]:
    """The array in units of its scales, in the split shape, not yet rounded to the format.

    Asymmetric: integers, shifted by the zero point.
    """
    scale = view.split_scale(effective_scale(range_))
    x = view.split(x.astype(jnp.float32))
    if spec.scale_format.smallest == 0:
        # A scale of zero (e4m3 underflow) stands for a block of zeros.
        v = jnp.where(scale != 0, divided(x, jnp.where(scale != 0, scale, 1.0)), jnp.zeros_like(x))
    else:
        v = divided(x, scale)
    if range_.zero_point is None:
        return v
    return jnp.round(v) + view.split_scale(range_.zero_point)


def rounded(levels: Array, spec: QuantSpec, range_: Range, view: BlockView) -> Array:
    """Levels of `to_levels` at their nearest values of the format."""
    if isinstance(spec.format, Learned):
        return spec.format.nearest(levels, value_table(spec.format, range_, view))[0]
    return spec.format.round(levels)


def coded(levels: Array, spec: QuantSpec, range_: Range, view: BlockView) -> Array:
    """The codes, uint8, of the nearest values."""
    if isinstance(spec.format, Learned):
        return spec.format.nearest(levels, value_table(spec.format, range_, view))[1]
    return spec.format.encode(levels)


def decoded(codes: Array, spec: QuantSpec, range_: Range, view: BlockView) -> Array:
    """The levels that codes, in the split shape, stand for."""
    if isinstance(spec.format, Learned):
        return spec.format.look_up(codes, value_table(spec.format, range_, view))
    return spec.format.decode(codes)


def value_table(fmt: Learned, range_: Range, view: BlockView) -> list[Array]:
    """The values of a learned format's codes, each in the split shape of the scale."""
    if range_.basis is None:
        raise ValueError(f"{fmt.name}: a range of learned values needs its basis.")
    return [view.split_scale(pinned(value)) for value in fmt.values(range_.basis)]


def from_levels(levels: Array, range_: Range, view: BlockView, dtype: Any) -> Array:
    """The inverse: values from levels that are on the grid, merged, rounded once to `dtype`."""
    if range_.zero_point is not None:
        levels = levels - view.split_scale(range_.zero_point)
    values = levels * view.split_scale(effective_scale(range_))
    return rounded_cast(view.merge(values), dtype)


def snap(x: Float[Array, "..."], spec: QuantSpec, range_: Range) -> Float[Array, "..."]:
    """Every element at its nearest value of the grid, in the dtype of `x`.

    Equals `QTensor.dequantize()` bit for bit. The value only: its gradient is an estimator's (see
    `estimators`).
    """
    view = BlockView.of(x.shape, spec)
    levels = rounded(to_levels(x, spec, range_, view), spec, range_, view)
    return from_levels(levels, range_, view, x.dtype)


def scales_of(values: Array, level: SecondLevel, second: Second) -> Float[Array, "..."]:
    """Scales from what `transposed_scales` made of them and `level.spec` rounded: at least 2**-119.

    Args:
        values: float32 [..., N / n, K / k].
        level: How scales are quantized.
        second: Its range.

    Returns:
        float32 [..., K / k, N / n].
    """
    if second.offset is not None:
        values = pinned(values) + _spread(second.offset, values.shape, level)
    return pinned(FLOAT32.round(jnp.swapaxes(values, -1, -2)))


def transposed_scales(scale: Array, level: SecondLevel, second: Second) -> Float[Array, "..."]:
    """What is rounded of scales [..., K / k, N / n]: without their offset, [..., N / n, K / k]."""
    scale = jnp.swapaxes(scale, -1, -2)
    if second.offset is None:
        return scale
    return pinned(scale - _spread(second.offset, scale.shape, level))


def snapped_scales(scale: Array, level: SecondLevel, second: Second) -> Float[Array, "..."]:
    """The nearest scales that codes stand for."""
    values = snap(transposed_scales(scale, level, second), level.spec, Range(second.scale))
    return scales_of(values, level, second)


def _spread(offset: Array, shape: tuple[int, ...], level: SecondLevel) -> Array:
    if level.offset == "mean":
        return offset
    return BlockView.of(shape, level.spec).spread(offset)
