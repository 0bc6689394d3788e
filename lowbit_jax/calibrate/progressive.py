"""Groups of integers: scales that are integers times one float per output."""

from typing import Final

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

from lowbit_jax.blocks import BlockView, divided, pinned
from lowbit_jax.formats import INT8, IntGrid
from lowbit_jax.grid import Range, Second
from lowbit_jax.scale_formats import FLOAT32
from lowbit_jax.spec import Block, PerChannel, QuantSpec

PROTECTIVE: Final = 119
"""Largest magnitude of the first level, so that no (code - zero point) * scale leaves int8."""


def require_progressive(where: str, spec: QuantSpec) -> None:
    """Raises ValueError unless a spec has zero points and int8 scales per output, no offset."""
    level = spec.second
    fits = (
        level is not None
        and level.spec == QuantSpec(format=INT8, granularity=Block(1, None))
        and level.offset is None
        and not spec.symmetric
        and spec.bits <= 4
        and spec.granularity.sizes((0, 0))[-1] == 1
    )
    if not fits:
        raise ValueError(
            f"{where}: takes groups of one output with zero points, at most 4 bits and a second "
            f"level of int8 per output without an offset, not {spec.describe()}."
        )


def progressive(x: Array, spec: QuantSpec) -> Range:
    """QServe's progressive range (arXiv:2405.04532).

    With s0 = max |x| / 119 of every output and the integers v = round(x / s0),

        s1 = round((max v - min v) / (2**b - 1)), at least 1,   z = round(-min v / s1),

    over each group, extremes widened to hold zero: scale = s1 * s0. Every (code - z) * s1 fits
    int8, so that a product runs in int8 and is scaled once per output. The paper quantizes v; here
    x is, so that it is rounded once.

    Args:
        x: [..., K, N].
        spec: As `require_progressive` wants it.

    Raises: ValueError: Another spec, or groups that do not divide K.
    """
    require_progressive("progressive", spec)
    assert isinstance(spec.format, IntGrid)
    x = x.astype(jnp.float32)
    outputs = BlockView.of(x.shape, QuantSpec(format=INT8, granularity=PerChannel()))
    largest = outputs.reduce(jnp.max, jnp.abs(x))
    first = pinned(FLOAT32.round(largest * np.float32(1 / PROTECTIVE)))
    integers = jnp.clip(jnp.round(divided(x, first)), -PROTECTIVE, PROTECTIVE)
    view = BlockView.of(x.shape, spec)
    low = jnp.minimum(view.reduce(jnp.min, integers), 0.0)
    high = jnp.maximum(view.reduce(jnp.max, integers), 0.0)
    steps = jnp.round((high - low) * np.float32(1 / spec.format.max))
    second = pinned(jnp.maximum(steps, np.float32(1)))
    zero_point = pinned(
        jnp.clip(jnp.round(divided(-low, second)), 0.0, np.float32(spec.format.max))
    )
    return Range(
        pinned(FLOAT32.round(second * first)),
        zero_point,
        second=Second(jnp.swapaxes(first, -1, -2)),
    )
