"""Ranges of least squared error: searched among shrunken ones, or exactly, by sorting."""

import dataclasses

import jax
import jax.numpy as jnp
from jaxtyping import Array

from lowbit_jax import formats
from lowbit_jax.blocks import BlockView
from lowbit_jax.calibrate.ranges import absmax, absmean, asymmetric, minmax, stored_scale
from lowbit_jax.grid import Range, snap
from lowbit_jax.spec import QuantSpec


def mse(
    x: Array,
    spec: QuantSpec,
    *,
    steps: int = 80,
    smallest: float = 0.2,
    norm: float = 2.0,
    importance: Array | None = None,
) -> Range:
    """The range of least squared error of each block, searched among shrunken full ranges.

    The full range is absmax, or min-max if the spec is asymmetric.

    GPTQ's search (`grid` 100, `maxshrink` 0.8); its norm is 2.4. Not for use inside a training
    step.

    Args:
        x: Array as the spec's granularity sees it.
        spec: Its spec.
        steps: How many ranges are tried, evenly spaced in (smallest, 1].
        smallest: Where the grid ends, as a share of the full range.
        norm: Power of the error that is summed; with 2 it is the squared error.
        importance: Weight of each element's error, of the rank of `x`; default: all alike.
    """
    if spec.second is not None:
        # Its scales depend on each other: searched as if they were stored, then quantized.
        plain = dataclasses.replace(spec, second=None)
        best = mse(x, plain, steps=steps, smallest=smallest, norm=norm, importance=importance)
        return stored_scale(best.scale, spec)._replace(zero_point=best.zero_point)
    x = x.astype(jnp.float32)
    view = BlockView.of(x.shape, spec)
    full = absmax(x, spec) if spec.symmetric else minmax(x, spec)

    def shrunken(share):
        if full.zero_point is None:
            return full._replace(scale=spec.scale_format.round(full.scale * share))
        low = -full.zero_point * full.scale
        high = (spec.format.max - full.zero_point) * full.scale
        return asymmetric(low * share, high * share, spec)

    def step(best, share):
        least, best_range = best
        candidate = shrunken(share)
        error = jnp.abs(snap(x, spec, candidate) - x)
        error = error * error if norm == 2 else error**norm
        if importance is not None:
            error = error * importance
        error = view.reduce(jnp.sum, error)
        better = error < least
        chosen = best_range._replace(
            scale=jnp.where(better, candidate.scale, best_range.scale),
            zero_point=None
            if full.zero_point is None
            else jnp.where(better, candidate.zero_point, best_range.zero_point),
        )
        return (jnp.minimum(error, least), chosen), None

    shares = jnp.linspace(1.0, smallest, steps, endpoint=False, dtype=jnp.float32)
    start = (jnp.full(view.scale_shape, jnp.inf, jnp.float32), full)
    (_, best), _ = jax.lax.scan(step, start, shares)
    return best


def exact(x: Array, spec: QuantSpec) -> Range:
    """The one scale of least squared error of each block, for ternary and binary values.

    Binary: mean |x| (XNOR-Net, arXiv:1603.05279, Eq. 6). Ternary: with the magnitudes m descending,
    the k largest becoming +-scale leave the error `sum m**2 - (m_1 + .. + m_k)**2 / k` at the scale
    `(m_1 + .. + m_k) / k`; the best of all k is taken (TWN, arXiv:1605.04711, Eq. 5, there solved
    approximately). Rounding to the nearest at that scale gives those k. It sorts, and sums in
    order: not for use inside a training step.

    Args:
        x: Array as the spec's granularity sees it.
        spec: Ternary or binary, with one level of scales.

    Raises:
        NotImplementedError: Another format: `mse` searches.
    """
    if spec.format not in (formats.TERNARY, formats.BINARY) or spec.has_global_scale:
        raise NotImplementedError(
            f"calibrate.exact: ternary and binary with one level of scales, not "
            f"{spec.describe()}. `calibrate.mse` searches any format."
        )
    if spec.format == formats.BINARY:
        return absmean(x, spec, eps=0.0)
    view = BlockView.of(x.shape, spec)
    magnitudes = jnp.abs(view.split(x.astype(jnp.float32)))
    # Blocks as rows: their axes last, merged, descending.
    axes = tuple(range(-len(view.block_axes), 0))
    rows = jnp.moveaxis(magnitudes, view.block_axes, axes) if axes else magnitudes[..., None]
    rows = rows.reshape(*rows.shape[: rows.ndim - max(len(axes), 1)], view.block_size)
    sums = jnp.cumsum(jnp.sort(rows, axis=-1, descending=True), axis=-1)
    counts = jnp.arange(1, view.block_size + 1, dtype=jnp.float32)
    counts = counts.reshape((1,) * (sums.ndim - 1) + (-1,))
    best = jnp.argmax(sums * sums / counts, axis=-1, keepdims=True)
    scale = jnp.take_along_axis(sums / counts, best, axis=-1)
    return stored_scale(scale.reshape(view.scale_shape), spec)
