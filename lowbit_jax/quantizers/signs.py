"""Binary weights and activations: BinaryConnect, BNN, XNOR-Net, Bi-Real, ReActNet, BitNet ..."""

import dataclasses
from typing import ClassVar, Literal, override

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from lowbit_jax import calibrate, formats
from lowbit_jax.blocks import BlockView, pinned
from lowbit_jax.grid import Range
from lowbit_jax.quantizers.base import State
from lowbit_jax.quantizers.reshaped import Reshaped, constant_range, expand
from lowbit_jax.scale_formats import FLOAT32
from lowbit_jax.spec import PerTensor


@dataclasses.dataclass(frozen=True)
class Sign(Reshaped):
    """sign(x) in {-1, 1}, zero going to +1; weights and activations.

    BinaryConnect (arXiv:1511.00363, Eq. 1) with `gradient="identity"`, whose weights its training
    also clips to [-1, 1] after each update: `optimizers.clip_latent`. BNN (arXiv:1602.02830, Eq. 4)
    with "hard_tanh": 1 where |x| <= 1, else 0. Bi-Real Net (arXiv:1808.00278, section 3.3) with
    "polynomial": 2 + 2x in [-1, 0), 2 - 2x in [0, 1), else 0.

    Attributes:
        gradient: "identity", "hard_tanh" or "polynomial".
    """

    gradient: Literal["identity", "hard_tanh", "polynomial"] = "hard_tanh"

    takes: ClassVar = (formats.BINARY,)

    @override
    def __post_init__(self):
        super().__post_init__()
        known = ["identity", "hard_tanh", "polynomial"]
        if self.gradient not in known:
            raise ValueError(f"Sign: gradient={self.gradient!r} is not of {known}.")

    @override
    def range(self, x: Float[Array, "..."], state: State) -> Range:
        return constant_range(x, self, 1.0)

    @override
    def slopes(
        self, x: Float[Array, "..."], x_hat: Array, state: State, range_: Range
    ) -> dict[str, Array]:
        magnitude = jnp.abs(x)
        if self.gradient == "identity":
            return {"x": jnp.ones_like(x)}
        if self.gradient == "hard_tanh":
            return {"x": (magnitude <= 1).astype(jnp.float32)}
        return {"x": jnp.maximum(2 - 2 * magnitude, 0.0)}


@dataclasses.dataclass(frozen=True)
class XNOR(Reshaped):
    """sign(w) * mean |w| with XNOR-Net's gradient (arXiv:1603.05279, Eq. 6 and section 3.1).

    d C / d w = d C / d w_hat * (1 / n + 1[|w| <= 1] * mean |w|), n the elements of a block.
    """

    takes: ClassVar = (formats.BINARY,)

    @override
    def range(self, x: Float[Array, "..."], state: State) -> Range:
        return calibrate.absmean(x, self.spec)

    @override
    def slopes(
        self, x: Float[Array, "..."], x_hat: Array, state: State, range_: Range
    ) -> dict[str, Array]:
        share = np.float32(1 / BlockView.of(x.shape, self.spec).block_size)
        inside = (jnp.abs(x) <= 1).astype(jnp.float32)
        return {"x": share + inside * expand(range_.scale, x, self)}


@dataclasses.dataclass(frozen=True)
class CentredSign(Reshaped):
    """BitNet's 1-bit weights (arXiv:2310.11453, Eqs. 1 to 3): sign(w - mean w) times mean |w|.

    The paper's scale beta is the mean magnitude of the weights as they are, before their mean is
    subtracted. Straight-through. Both means are sums of integers, as in `calibrate.absmean`.
    """

    takes: ClassVar = (formats.BINARY,)

    @override
    def range(self, x: Float[Array, "..."], state: State) -> Range:
        return calibrate.absmean(x, self.spec)

    @override
    def reshaped(self, x: Float[Array, "..."], state: State, range_: Range) -> Array:
        spec = dataclasses.replace(self.spec, scale_format=FLOAT32)

        def mean(part: Array) -> Array:
            return calibrate.absmean(part, spec, eps=0.0).scale

        zero = jnp.zeros_like(x)
        centre = pinned(mean(jnp.where(x > 0, x, zero)) - mean(jnp.where(x < 0, x, zero)))
        scale = expand(range_.scale, x, self)
        value = jnp.where(x >= expand(centre, x, self), scale, -scale)
        return jnp.where(jnp.isnan(x), x, value)

    @override
    def slopes(
        self, x: Float[Array, "..."], x_hat: Array, state: State, range_: Range
    ) -> dict[str, Array]:
        return {"x": jnp.ones_like(x)}


@dataclasses.dataclass(frozen=True)
class LearnedMagnitude(Reshaped):
    """sign(w) times a learned magnitude that starts at mean |w|; methods differ in derivatives."""

    trainable: ClassVar[tuple[str, ...]] = ("scale",)
    takes: ClassVar = (formats.BINARY,)

    @override
    def init(self, x: Float[Array, "..."]) -> State:
        return {"scale": calibrate.absmean(x, self.spec).scale}

    @override
    def range(self, x: Float[Array, "..."], state: State) -> Range:
        return Range(self.spec.scale_format.round(state["scale"].astype(jnp.float32)))


@dataclasses.dataclass(frozen=True)
class OneBit(LearnedMagnitude):
    """sign(w) * h with a learned h, the output's value vector of OneBit (arXiv:2402.11295, Eq. 3).

    The derivatives are those of the product: by h sign(w), by the sign matrix h, which is passed on
    to w straight-through. h starts at mean |w|; `onebit.one_bit_model` starts it, and the input's
    value vector, from the paper's decomposition. Deviation: h stays positive, as scales do.
    """

    @override
    def slopes(
        self, x: Float[Array, "..."], x_hat: Array, state: State, range_: Range
    ) -> dict[str, Array]:
        sign = jnp.where(x_hat < 0, np.float32(-1), np.float32(1))
        return {"x": expand(range_.scale, x, self), "scale": sign}


@dataclasses.dataclass(frozen=True)
class RSign(Reshaped):
    """ReActNet's activations: sign(x - threshold), a learned threshold per feature.

    arXiv:2003.03488, section 4.2, with Bi-Real Net's polynomial as the derivative by x - threshold.
    Thresholds start at 0. It goes with `nn.RPReLU`.
    """

    trainable: ClassVar[tuple[str, ...]] = ("threshold",)
    takes: ClassVar = (formats.BINARY,)

    @override
    def __post_init__(self):
        super().__post_init__()
        if self.spec.granularity != PerTensor():
            raise ValueError(
                f"RSign: its values are -1 and 1, so PerTensor(), not {self.spec.granularity}."
            )

    @override
    def init(self, x: Float[Array, "..."]) -> State:
        return {"threshold": jnp.zeros((*x.shape[:-2], 1, x.shape[-1]), jnp.float32)}

    @override
    def range(self, x: Float[Array, "..."], state: State) -> Range:
        return constant_range(x, self, 1.0)

    @override
    def reshaped(self, x: Float[Array, "..."], state: State, range_: Range) -> Array:
        threshold = state["threshold"].astype(jnp.float32)
        return x - threshold.reshape((1,) * (x.ndim - 1) + (-1,))

    @override
    def slopes(
        self, x: Float[Array, "..."], x_hat: Array, state: State, range_: Range
    ) -> dict[str, Array]:
        slope = jnp.maximum(2 - 2 * jnp.abs(self.reshaped(x, state, range_)), 0.0)
        return {"x": slope, "threshold": -slope}
