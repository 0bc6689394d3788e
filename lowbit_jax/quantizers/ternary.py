"""Ternary weights with a threshold: TWN."""

import dataclasses
from typing import ClassVar, override

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from lowbit_jax import calibrate, formats
from lowbit_jax.blocks import BlockView, pinned
from lowbit_jax.grid import Range
from lowbit_jax.quantizers.base import State
from lowbit_jax.quantizers.reshaped import Reshaped, expand
from lowbit_jax.scale_formats import FLOAT32


@dataclasses.dataclass(frozen=True)
class TWN(Reshaped):
    """Ternary weight networks (arXiv:1605.04711, Eqs. 4 to 6).

    Threshold = 0.7 mean |w|; scale = the mean magnitude of the weights above it; weights at or
    below it are 0. The gradient is straight-through. `calibrate.exact` is the optimum that the
    threshold approximates.

    Attributes:
        threshold: In units of mean |w|; the paper's 0.7, which it derives for normal weights to lie
            between 2/3 and 0.75.
    """

    threshold: float = 0.7

    takes: ClassVar = (formats.TERNARY,)

    @override
    def __post_init__(self):
        super().__post_init__()
        if not self.threshold >= 0:
            raise ValueError(f"TWN: threshold={self.threshold} is not 0 or more.")

    def _kept(self, x: Array) -> Array:
        """Where |w| is above the threshold."""
        spec = dataclasses.replace(self.spec, scale_format=FLOAT32)
        mean = calibrate.absmean(x, spec, eps=0.0).scale
        limit = pinned(mean * np.float32(self.threshold))
        return jnp.abs(x) > expand(limit, x, self)

    @override
    def range(self, x: Float[Array, "..."], state: State) -> Range:
        x = x.astype(jnp.float32)
        kept, view = self._kept(x), BlockView.of(x.shape, self.spec)
        count = view.reduce(jnp.sum, kept.astype(jnp.int32)).astype(jnp.float32)
        spec = dataclasses.replace(self.spec, scale_format=FLOAT32)
        # The mean over all, made one over the kept: both counts are exact.
        mean = calibrate.absmean(jnp.where(kept | jnp.isnan(x), x, 0.0), spec, eps=0.0).scale
        share = pinned(np.float32(view.block_size) / jnp.maximum(count, 1.0))
        return Range(pinned(self.spec.scale_format.round(pinned(mean * share))))

    @override
    def reshaped(self, x: Float[Array, "..."], state: State, range_: Range) -> Array:
        scale = expand(range_.scale, x, self)
        value = jnp.where(self._kept(x), jnp.where(x < 0, -scale, scale), jnp.zeros_like(x))
        return jnp.where(jnp.isnan(x), x, value)

    @override
    def slopes(
        self, x: Float[Array, "..."], x_hat: Array, state: State, range_: Range
    ) -> dict[str, Array]:
        return {"x": jnp.ones_like(x)}
