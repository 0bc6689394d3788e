"""Ranges that are a formula of the array: magnitudes, extremes, means, quantiles.

Every function is a deterministic function of the array that does not depend on the order of a
reduction, so that sharding or fusing it changes no code: maxima do not, and means are summed in
integers. Constants enter as float32 reciprocals.
"""

import math
from typing import Final

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

from lowbit_jax.blocks import BlockView, divided, pinned, reduce_matrix
from lowbit_jax.formats import BINARY, Minifloat
from lowbit_jax.grid import Range, Second, snapped_scales, transposed_scales
from lowbit_jax.rounding import round_minifloat
from lowbit_jax.spec import PerTensor, QuantSpec

# Its product with the smallest e4m3 scale, 2**-9, and the smallest value of a format stays normal.
_SMALLEST_GLOBAL: Final = 2.0**-110


def absmax(x: Array, spec: QuantSpec, *, global_absmax: Array | None = None) -> Range:
    """Symmetric range from the largest magnitude of each block.

    scale = absmax / half_range of the format: `2 absmax / (2**b - 1)` for full integer ranges
    (GPTQ's convention), `absmax / (2**(b-1) - 1)` for narrow ones, `absmax / 6` for e2m1.
    With e8m0 scales: `2**(floor(log2 absmax) - floor(log2 max))` (OCP MX v1.0, section 6.3); those
    that round up: the least power of two that is `absmax / half_range` or more; those that round
    to even: the first formula, with absmax rounded to the format's mantissa.
    With e4m3 scales (NVFP4): global_scale = absmax of the matrix / (448 * max), scale = e4m3(absmax
    / max / global_scale).

    Args:
        x: Array as the spec's granularity sees it.
        spec: Its spec; symmetric.
        global_absmax: With e4m3 scales, the magnitude that the global scale covers; default: that
            of `x`.

    Raises:
        ValueError: The spec is asymmetric, or an axis does not split into its blocks.
    """
    if not spec.symmetric:
        raise ValueError("absmax: the range of an asymmetric spec is `minmax`.")
    x = x.astype(jnp.float32)
    view = BlockView.of(x.shape, spec)
    block = view.reduce(jnp.max, jnp.abs(x))
    if spec.has_global_scale:
        whole = reduce_matrix(jnp.max, jnp.abs(x), spec) if global_absmax is None else global_absmax
        return _two_level(block, whole, spec)
    return _one_level(block, spec)


def _one_level(block: Array, spec: QuantSpec) -> Range:
    """The range whose ends are +-`block`."""
    if spec.scale_format.rounding in ("floor", "even"):
        if isinstance(spec.format, Minifloat) and spec.scale_format.rounding == "even":
            block = round_minifloat(
                block,
                mantissa_bits=spec.format.mantissa_bits,
                min_exponent=-100,
                largest=float(np.finfo(np.float32).max),
            )
        largest_exponent = math.floor(math.log2(spec.format.max))
        return stored_scale(block * np.float32(2.0**-largest_exponent), spec)
    return stored_scale(block * np.float32(1 / spec.format.half_range), spec)


def stored_scale(scale: Array, spec: QuantSpec) -> Range:
    """The range whose scales are these as they are stored: rounded, or quantized in their turn."""
    if spec.second is None:
        return Range(pinned(spec.scale_format.round(scale)))
    level, scale, offset = spec.second, pinned(spec.scale_format.round(scale)), None
    if level.offset == "mean":
        offset = absmean(scale, QuantSpec(format=BINARY, granularity=PerTensor()), eps=0.0).scale
    elif level.offset == "middle":
        outputs = jnp.swapaxes(scale, -1, -2)
        view = BlockView.of(outputs.shape, level.spec)
        low, high = view.reduce(jnp.min, outputs), view.reduce(jnp.max, outputs)
        offset = pinned((low + high) * np.float32(0.5))
    centred = transposed_scales(scale, level, Second(scale, offset))
    second = Second(absmax(centred, level.spec).scale, offset)
    return Range(snapped_scales(scale, level, second), second=second)


def quantile(x: Array, spec: QuantSpec, *, share: float = 0.999) -> Range:
    """Range that covers a share of each block's elements, the others saturate.

    Symmetric: from the quantile of the magnitudes. Asymmetric: from the quantiles `(1 - share) / 2`
    and `(1 + share) / 2`, widened to hold zero. Linear between order statistics. It sorts: not for
    use inside a training step.

    Args:
        x: Array as the spec's granularity sees it.
        spec: Its spec; with one level of scales.
        share: In (0, 1].

    Raises:
        ValueError: A share outside (0, 1].
        NotImplementedError: A spec with a global scale.
    """
    if not 0 < share <= 1:
        raise ValueError(f"quantile: share={share} is not in (0, 1].")
    if spec.has_global_scale:
        raise NotImplementedError("quantile: one scale level only; NVFP4's ranges are `absmax`.")
    x = x.astype(jnp.float32)
    view = BlockView.of(x.shape, spec)

    def at(values: Array, q: float) -> Array:
        return view.reduce(lambda v, axis, keepdims: _quantile(v, q, axis), values)

    if spec.symmetric:
        return _one_level(at(jnp.abs(x), share), spec)
    low, high = at(x, (1 - share) / 2), at(x, (1 + share) / 2)
    return asymmetric(jnp.minimum(low, 0.0), jnp.maximum(high, 0.0), spec)


def _quantile(x: Array, q: float, axis: tuple[int, ...]) -> Array:
    return jnp.quantile(x, np.float32(q), axis=axis, keepdims=True)


def _two_level(block: Array, whole: Array, spec: QuantSpec) -> Range:
    factor = 1 / (spec.scale_format.largest * spec.format.max)
    global_scale = pinned(jnp.maximum(whole * np.float32(factor), np.float32(_SMALLEST_GLOBAL)))
    relative = divided(pinned(block * np.float32(1 / spec.format.half_range)), global_scale)
    return Range(pinned(spec.scale_format.round(relative)), global_scale=global_scale)


def minmax(x: Array, spec: QuantSpec) -> Range:
    """Asymmetric range from the smallest and the largest value of each block, widened to hold zero.

    scale = (max - min) / (2**b - 1), zero_point = round(-min / scale), as in GPTQ.

    Raises:
        ValueError: The spec is symmetric, or an axis does not split into its blocks.
    """
    if spec.symmetric:
        raise ValueError("minmax: the range of a symmetric spec is `absmax`.")
    x = x.astype(jnp.float32)
    view = BlockView.of(x.shape, spec)
    low = jnp.minimum(view.reduce(jnp.min, x), 0.0)
    high = jnp.maximum(view.reduce(jnp.max, x), 0.0)
    return asymmetric(low, high, spec)


def asymmetric(low: Array, high: Array, spec: QuantSpec) -> Range:
    """The range from `low` to `high`, of the scale's shape, with an integer zero point."""
    levels = spec.format.half_range * 2
    found = stored_scale((high - low) * np.float32(1 / levels), spec)
    zero_point = jnp.clip(jnp.round(divided(-low, found.scale)), 0.0, np.float32(levels))
    return found._replace(zero_point=pinned(zero_point))


def absmean(x: Array, spec: QuantSpec, *, eps: float = 1e-5) -> Range:
    """Symmetric range from the mean magnitude of each block: scale = max(mean |x|, eps).

    BitNet b1.58's ternary scale (arXiv:2402.17764, Eq. 1 to 3) and, for the binary format,
    XNOR-Net's (arXiv:1603.05279, Eq. 6). The mean is a sum of integers: |x| / max in fixed point of
    at least 2**-18 of the maximum for K up to 4096.

    Raises:
        ValueError: The spec is asymmetric, or an axis does not split into its blocks.
    """
    if not spec.symmetric:
        raise ValueError("absmean: needs a symmetric spec.")
    x = jnp.abs(x.astype(jnp.float32))
    view = BlockView.of(x.shape, spec)
    split, k_axis, n_axes = view.split(x), view.block_axes[:1], view.block_axes[1:]
    largest = jnp.max(split, axis=view.block_axes, keepdims=True)
    # Fixed point with room for the sum over K in an int32.
    fraction_bits = 30 - _bits_of_count(split, k_axis)
    # NaN and infinities would be lost in the integers; they are put back at the end.
    unit = pinned(np.float32(2.0**fraction_bits) / jnp.maximum(largest, np.float32(2.0**-90)))
    fixed = jnp.round(jnp.where(jnp.isfinite(split), split, 0.0) * unit).astype(jnp.int32)
    total = jnp.sum(fixed, axis=k_axis, keepdims=True)
    if n_axes:
        # The sums over K fill an int32: over N they are summed in fields that leave room for the
        # carries, and joined in float32.
        width = 31 - _bits_of_count(split, n_axes)
        total_float = jnp.zeros(view.split_scale_shape, jnp.float32)
        for shift in reversed(range(0, 31, width)):
            field = jnp.sum((total >> shift) & (2**width - 1), axis=n_axes, keepdims=True)
            # Products by powers of two are exact, so that fusing them with the sum changes nothing.
            total_float += field.astype(jnp.float32) * np.float32(2.0**shift)
    else:
        total_float = total.astype(jnp.float32)
    mean_fixed = pinned(pinned(total_float) * np.float32(1 / view.block_size))
    mean = jnp.where(jnp.isfinite(largest), mean_fixed / unit, largest)
    scale = jnp.maximum(mean.reshape(view.scale_shape), np.float32(eps))
    return stored_scale(scale, spec)


def _bits_of_count(x: Array, axes: tuple[int, ...]) -> int:
    """Bits that a sum over these axes can grow by, at least one."""
    return max(math.ceil(math.log2(math.prod(x.shape[axis] for axis in axes))), 1)
