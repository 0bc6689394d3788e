"""ParetoQ's weights of one bit, ternary and two bits, with a learned range (arXiv:2502.02631)."""

import dataclasses
import math
from typing import ClassVar, override

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from lowbit_jax import formats
from lowbit_jax.blocks import BlockView, divided
from lowbit_jax.grid import Range
from lowbit_jax.quantizers.base import State
from lowbit_jax.quantizers.reshaped import Reshaped, expand
from lowbit_jax.quantizers.signs import LearnedMagnitude


@dataclasses.dataclass(frozen=True)
class ElasticBinary(LearnedMagnitude):
    """alpha * sign(w) with a learned alpha, ParetoQ's 1-bit weights (arXiv:2502.02631).

    alpha starts at mean |w|. With the sign straight-through inside the range, the derivative by w
    is 1[|w| < alpha] and that by alpha is sign(w), scaled by LSQ's 1 / sqrt(n) (Q_P = 1).
    """

    @override
    def slopes(
        self, x: Float[Array, "..."], x_hat: Array, state: State, range_: Range
    ) -> dict[str, Array]:
        block = BlockView.of(x.shape, self.spec).block_size
        inside = jnp.abs(x) < expand(range_.scale, x, self)
        sign = jnp.where(x_hat < 0, np.float32(-1), np.float32(1))
        return {
            "x": inside.astype(jnp.float32),
            "scale": sign * np.float32(1 / math.sqrt(block)),
        }


@dataclasses.dataclass(frozen=True)
class StretchedElastic(Reshaped):
    """ParetoQ's stretched ternary and 2-bit weights with a learned alpha (arXiv:2502.02631).

    w_hat = alpha (round(clip(w / alpha, -1, 1) n - s) + s) / n with n = 3/2, s = 0 for ternary and
    n = 2, s = 1/2 for two bits: the levels of `ternary` and `int2_half` at the scale alpha / n. The
    gradients are those of this equation with the rounding straight-through: by w 1[|w| < alpha], by
    alpha `w_hat / alpha - w / alpha` inside and `w_hat / alpha` outside, scaled by LSQ's
    1 / sqrt(n_w Q_P), Q_P = 1. alpha starts at max |w|. Unlike LSQ, weights between the outermost
    level and alpha keep their gradient.
    """

    trainable: ClassVar[tuple[str, ...]] = ("alpha",)
    takes: ClassVar = (formats.TERNARY, formats.INT2_HALF)

    @property
    def _stretch(self) -> float:
        """n of the equation: half the number of levels."""
        return 1.5 if self.spec.format == formats.TERNARY else 2.0

    @override
    def init(self, x: Float[Array, "..."]) -> State:
        view = BlockView.of(x.shape, self.spec)
        return {"alpha": view.reduce(jnp.max, jnp.abs(x.astype(jnp.float32)))}

    @override
    def range(self, x: Float[Array, "..."], state: State) -> Range:
        alpha = state["alpha"].astype(jnp.float32)
        return Range(self.spec.scale_format.round(alpha * np.float32(1 / self._stretch)))

    @override
    def slopes(
        self, x: Float[Array, "..."], x_hat: Array, state: State, range_: Range
    ) -> dict[str, Array]:
        block = BlockView.of(x.shape, self.spec).block_size
        alpha = expand(range_.scale * np.float32(self._stretch), x, self)
        share, level = divided(x, alpha), divided(x_hat, alpha)
        inside = jnp.abs(share) < 1
        each = level - jnp.where(inside, share, jnp.zeros_like(share))
        return {
            "x": inside.astype(jnp.float32),
            "alpha": each * np.float32(1 / math.sqrt(block)),
        }
