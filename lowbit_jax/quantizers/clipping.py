"""Activations with a learned range: PACT and LSQ+."""

import dataclasses
import math
from typing import ClassVar, override

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from lowbit_jax.blocks import divided, pinned
from lowbit_jax.grid import Range
from lowbit_jax.quantizers.base import State, as_row
from lowbit_jax.quantizers.reshaped import Reshaped
from lowbit_jax.spec import PerTensor


class LearnedRange(Reshaped):
    """Asymmetric, one learned range per tensor."""

    shared_part: ClassVar[bool] = True
    symmetric: ClassVar[bool] = False

    @override
    def __post_init__(self):
        super().__post_init__()
        if self.spec.granularity != PerTensor():
            raise ValueError(
                f"{type(self).__name__}: one learned range per tensor, so PerTensor(), not "
                f"{self.spec.granularity}."
            )

    def _spread(self, leaf: Array, x: Array) -> Array:
        """A leaf of one element in the shape of the scale."""
        leaf = as_row(leaf.astype(jnp.float32), x.ndim)
        return jnp.broadcast_to(leaf, self.spec.scale_shape(x.shape))


@dataclasses.dataclass(frozen=True)
class PACT(LearnedRange):
    """clip(x, 0, alpha) in equal steps, alpha learned (arXiv:1805.06085, Eqs. 1 to 3).

    scale = alpha / (2**b - 1). The derivative by x is 1 where 0 < x < alpha, that by alpha 1 where
    x >= alpha, else 0 (the paper's Eq. 3, which leaves out what rounding contributes). For
    activations after a ReLU; the paper decays alpha like a weight. With `start=1` and an alpha that
    is not trained these are DoReFa-Net's activations (arXiv:1606.06160, Eq. 11).

    Attributes:
        start: alpha at the beginning.
    """

    start: float = 8.0

    trainable: ClassVar[tuple[str, ...]] = ("clip",)

    @override
    def __post_init__(self):
        super().__post_init__()
        if not self.start > 0:
            raise ValueError(f"PACT: start={self.start} is not positive.")

    @override
    def init(self, x: Float[Array, "..."]) -> State:
        return {"clip": jnp.full((*x.shape[:-2], 1, 1), self.start, jnp.float32)}

    @override
    def range(self, x: Float[Array, "..."], state: State) -> Range:
        clip = self._spread(state["clip"], x)
        scale = self.spec.scale_format.round(clip * np.float32(1 / self.spec.format.max))
        return Range(pinned(scale), jnp.zeros_like(scale))

    @override
    def slopes(
        self, x: Float[Array, "..."], x_hat: Array, state: State, range_: Range
    ) -> dict[str, Array]:
        clip = as_row(state["clip"].astype(jnp.float32), x.ndim)
        above = x >= clip
        inside = (x > 0) & ~above
        return {"x": inside.astype(jnp.float32), "clip": above.astype(jnp.float32)}


@dataclasses.dataclass(frozen=True)
class LSQPlus(LearnedRange):
    """LSQ+ (arXiv:2004.09576): learned scale s and offset beta, for activations.

    x_hat = clip(round((x - beta) / s), 0, 2**b - 1) s + beta, with d/ds = round(v) - v inside and
    the end of the range outside, v = (x - beta) / s; d/dbeta = 0 inside, 1 outside. One deviation:
    the offset is used at the nearest multiple of s, since zero points are integers in every file
    and kernel; its gradient passes that rounding. The range starts from the extremes seen while
    calibrating; until then it is NaN, and so is every result.

    Attributes:
        gradient_scale: Whether the scale's gradient is multiplied by 1 / sqrt(N Qp), as in LSQ.
    """

    gradient_scale: bool = True

    trainable: ClassVar[tuple[str, ...]] = ("scale", "offset")
    starts: ClassVar[tuple[str, ...]] = ("scale", "offset")

    @override
    def init(self, x: Float[Array, "..."]) -> State:
        unknown = jnp.full((*x.shape[:-2], 1, 1), jnp.nan, jnp.float32)
        return {"scale": unknown, "offset": unknown}

    @override
    def observe(self, x: Float[Array, "..."], state: State) -> State:
        scale, offset = state["scale"], state["offset"]
        end = np.float32(self.spec.format.max)
        x = x.astype(jnp.float32)
        # fmin and fmax: the NaN of "never seen" gives way.
        low = jnp.fmin(offset, jnp.reshape(jnp.minimum(jnp.min(x), 0.0), offset.shape))
        high = jnp.fmax(offset + scale * end, jnp.reshape(jnp.max(x), offset.shape))
        return {"scale": (high - low) * np.float32(1 / self.spec.format.max), "offset": low}

    @override
    def range(self, x: Float[Array, "..."], state: State) -> Range:
        scale = pinned(self.spec.scale_format.round(self._spread(state["scale"], x)))
        offset = self._spread(state["offset"], x)
        zero_point = jnp.round(divided(-offset, scale))
        return Range(scale, pinned(jnp.clip(zero_point, 0.0, np.float32(self.spec.format.max))))

    @override
    def slopes(
        self, x: Float[Array, "..."], x_hat: Array, state: State, range_: Range
    ) -> dict[str, Array]:
        assert range_.zero_point is not None
        scale = as_row(range_.scale.reshape(-1)[:1], x.ndim)
        zero_point = as_row(range_.zero_point.reshape(-1)[:1], x.ndim)
        end = np.float32(self.spec.format.max)
        v = divided(x, scale)
        low, high = v < -zero_point, v > end - zero_point
        # In units of (x - beta) / s the ends are 0 and 2**b - 1.
        outside = jnp.where(low, jnp.zeros_like(v), jnp.full_like(v, end))
        by_scale = jnp.where(low | high, outside, jnp.round(v) - v)
        factor = 1 / math.sqrt(x.size * self.spec.format.max) if self.gradient_scale else 1.0
        return {
            "x": (~(low | high)).astype(jnp.float32),
            "scale": by_scale * np.float32(factor),
            "offset": (low | high).astype(jnp.float32),
        }
