"""N2UQ: activations with learned thresholds and equidistant values, weights of even occupancy."""

import dataclasses
from typing import ClassVar, override

import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Float

from lowbit_jax import calibrate, formats
from lowbit_jax.blocks import pinned, rounded_cast
from lowbit_jax.estimators import generalized_ste
from lowbit_jax.grid import Range, snap
from lowbit_jax.quantizers.base import State
from lowbit_jax.quantizers.clipping import LearnedRange
from lowbit_jax.quantizers.reshaped import Reshaped, expand, inside
from lowbit_jax.scale_formats import FLOAT32


@dataclasses.dataclass(frozen=True)
class N2UQ(LearnedRange):
    """Nonuniform-to-uniform activations (arXiv:2111.14826): thresholds learned, values equidistant.

    The positive axis is cut into 2**b - 1 intervals of learned lengths a_1, a_2, .. from 0 on, with
    ends d_i = a_1 + .. + a_i. An x is turned into the number of intervals whose middle it has
    passed: thresholds T_i = d_(i-1) + a_i / 2, codes 0 .. 2**b - 1, value code * scale with a
    learned scale. Thresholds leave no trace in what is stored. The gradient is the generalized
    straight-through estimator, that of the expectation of rounding up inside an interval with the
    probability (x - d_(i-1)) / a_i; see `estimators.generalized_ste`. For activations after a ReLU.

    Intervals start equal, from the largest activation seen while calibrating, with the scale their
    length; until then they are NaN, and so is every result. Lengths below `smallest` count as that.

    Attributes:
        smallest: Least length of an interval, in the unit of the activations.
    """

    smallest: float = 1e-3

    trainable: ClassVar[tuple[str, ...]] = ("intervals", "scale")
    starts: ClassVar[tuple[str, ...]] = ("intervals", "scale")

    @override
    def __post_init__(self):
        super().__post_init__()
        if not self.smallest > 0:
            raise ValueError(f"N2UQ: smallest={self.smallest} is not positive.")

    @property
    def _steps(self) -> int:
        return int(self.spec.format.max)

    @override
    def init(self, x: Float[Array, "..."]) -> State:
        lead = (*x.shape[:-2], 1)
        return {
            "intervals": jnp.full((*lead, self._steps), jnp.nan, jnp.float32),
            "scale": jnp.full((*lead, 1), jnp.nan, jnp.float32),
        }

    @override
    def observe(self, x: Float[Array, "..."], state: State) -> State:
        length = jnp.max(x.astype(jnp.float32)) * np.float32(1 / self._steps)
        length = jnp.fmax(state["scale"], jnp.maximum(length, np.float32(self.smallest)))
        return {"intervals": jnp.broadcast_to(length, state["intervals"].shape), "scale": length}

    def _lengths(self, state: State) -> Array:
        lengths = state["intervals"].astype(jnp.float32).reshape(-1)
        return pinned(jnp.maximum(lengths, np.float32(self.smallest)))

    @override
    def range(self, x: Float[Array, "..."], state: State) -> Range:
        scale = self.spec.scale_format.round(self._spread(state["scale"], x))
        return Range(pinned(scale), jnp.zeros_like(scale))

    @override
    def reshaped(self, x: Float[Array, "..."], state: State, range_: Range) -> Array:
        lengths, start = self._lengths(state), jnp.zeros((), jnp.float32)
        code = jnp.zeros_like(x)
        for i in range(self._steps):
            threshold = pinned(start + lengths[i] * np.float32(0.5))
            code = code + (x >= threshold).astype(jnp.float32)
            start = pinned(start + lengths[i])
        # Products by a small integer, back to which the division by the scale rounds.
        value = pinned(code * expand(range_.scale, x, self))
        return jnp.where(jnp.isnan(x) | jnp.isnan(start), x + start, value)

    @override
    def fake_quant(self, x: Float[Array, "..."], state: State) -> Float[Array, "..."]:
        x32 = x.astype(jnp.float32)
        constant, fixed = lax.stop_gradient((x32, state))
        range_ = self.range(constant, fixed)
        x_hat = snap(self.reshaped(constant, fixed, range_), self.spec, range_)
        lengths = state["intervals"].astype(jnp.float32).reshape(-1)
        scale = state["scale"].astype(jnp.float32).reshape(-1)
        return rounded_cast(generalized_ste(x_hat, x32, lengths, scale, self.smallest), x.dtype)

    @override
    def slopes(
        self, x: Float[Array, "..."], x_hat: Array, state: State, range_: Range
    ) -> dict[str, Array]:
        raise NotImplementedError("N2UQ: its gradient is `estimators.generalized_ste`.")


@dataclasses.dataclass(frozen=True)
class EntropyPreserving(Reshaped):
    """N2UQ's weights (arXiv:2111.14826): mean |w| is brought to where all 2**b values are used.

    w' = 2**(b-1) / (2**b - 1) w / mean |w| is clipped to [-1, 1] and rounded to 2**b equidistant
    values: for uniformly distributed weights each of them is taken equally often. The gradient
    passes where |w'| <= 1, the mean a constant. Deviation: the values are multiplied by what w was
    divided by (the paper leaves that to the batch norm behind the layer), so that the scale of the
    half-shifted levels is mean |w| 2**(2 - b).
    """

    takes: ClassVar = (
        formats.INT2_HALF, formats.INT3_HALF, formats.INT4_HALF, formats.INT5_HALF,
        formats.INT6_HALF, formats.INT7_HALF, formats.INT8_HALF,
    )  # fmt: skip

    @override
    def range(self, x: Float[Array, "..."], state: State) -> Range:
        mean = calibrate.absmean(x, dataclasses.replace(self.spec, scale_format=FLOAT32), eps=0.0)
        scale = pinned(mean.scale * np.float32(2.0 ** (2 - self.spec.bits)))
        return Range(pinned(self.spec.scale_format.round(scale)))

    @override
    def slopes(
        self, x: Float[Array, "..."], x_hat: Array, state: State, range_: Range
    ) -> dict[str, Array]:
        return {"x": inside(x, range_, self)}
