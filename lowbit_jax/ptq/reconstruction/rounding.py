"""Variables that decide the rounding."""

import dataclasses
from typing import override

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

from lowbit_jax.blocks import BlockView
from lowbit_jax.formats import IntGrid
from lowbit_jax.grid import effective_scale
from lowbit_jax.ptq.reconstruction.variables import Parameters, Start, Variable
from lowbit_jax.spec import QuantSpec


@dataclasses.dataclass(frozen=True)
class SoftRounding(Variable):
    """AdaRound (arXiv:2004.10568): every weight learns whether it goes down or up.

    w_hat = scale * (floor(w / scale) + h(V)), h(V) = clip(sigmoid(V) (zeta - gamma) + gamma, 0, 1)
    (Eq. 22 and 23, zeta 1.1, gamma -0.1), V started so that h(V) is the fraction that the floor
    leaves, with the penalty lambda * sum(1 - |2 h(V) - 1|^beta) (Eq. 24), beta falling from 20 to 2
    after a warm-up without it. The floor is that of the range at the start: a scale that is learned
    too stretches the levels and does not move them.

    Attributes:
        lr: Adam's; the authors use 1e-3.
        regularization: lambda.
        beta: At the end of the warm-up, and in the end.
        warmup: Share of the steps without penalty.
    """

    lr: float = 1e-3
    regularization: float = 0.01
    beta: tuple[float, float] = (20.0, 2.0)
    warmup: float = 0.2

    @override
    def init(self, start: Start, spec: QuantSpec) -> Parameters:
        if not isinstance(spec.format, IntGrid) or spec.format.step != 1:
            raise NotImplementedError(
                "SoftRounding: floor and ceiling are those of integers, not of "
                f"{spec.format.name}. Use RoundingOffset."
            )
        fraction = jnp.clip(_fraction(start, spec), 0.0, 1.0)
        # The inverse of h; its ends are left out, where the sigmoid would be infinite.
        inner = (fraction + np.float32(0.1)) * np.float32(1 / 1.2)
        return {"v": jnp.log(inner) - jnp.log1p(-inner)}

    @override
    def levels(self, parameters: Parameters, start: Start, spec: QuantSpec) -> Array:
        return _floor(start, spec) + _rectified(parameters["v"])

    @override
    def hard_levels(self, parameters: Parameters, start: Start, spec: QuantSpec) -> Array:
        return _floor(start, spec) + (parameters["v"] >= 0).astype(jnp.float32)

    @override
    def penalty(self, parameters: Parameters, progress: Array) -> Array:
        along = jnp.clip((progress - self.warmup) / (1 - self.warmup), 0.0, 1.0)
        begin, end = self.beta
        beta = end + (begin - end) * (1 - along)
        distance = jnp.abs(2 * _rectified(parameters["v"]) - 1)
        total = jnp.sum(1 - jnp.maximum(distance, np.float32(1e-12)) ** beta)
        return jnp.where(progress < self.warmup, 0.0, self.regularization * total)


@dataclasses.dataclass(frozen=True)
class RoundingOffset(Variable):
    """AutoRound (SignRound, arXiv:2309.05516, Eq. 3): an offset in [-0.5, 0.5] before the rounding.

    w_hat = scale * clip(round(w / scale + V)); straight-through. Attributes: `limit`, the largest
    offset; above 0.5 weights may move by more than one level.
    """

    lr: float = 5e-3
    limit: float = 0.5

    @override
    def init(self, start: Start, spec: QuantSpec) -> Parameters:
        return {"v": jnp.zeros_like(start.weight)}

    @override
    def offset(self, parameters: Parameters) -> Array:
        return parameters["v"]

    @override
    def project(self, parameters: Parameters) -> Parameters:
        limit = np.float32(self.limit)
        return {"v": jnp.clip(parameters["v"], -limit, limit)}


@dataclasses.dataclass(frozen=True)
class Weights(Variable):
    """The weights themselves, straight-through (EfficientQAT's block phase, arXiv:2407.11062)."""

    lr: float = 1e-5

    @override
    def init(self, start: Start, spec: QuantSpec) -> Parameters:
        return {"weight": start.weight}

    @override
    def weight(self, parameters: Parameters, weight: Array) -> Array:
        return parameters["weight"]


def _rectified(v: Array) -> Array:
    return jnp.clip(jax.nn.sigmoid(v) * np.float32(1.2) - np.float32(0.1), 0.0, 1.0)


def _shift(spec: QuantSpec) -> np.float32:
    assert isinstance(spec.format, IntGrid)
    return np.float32(spec.format.qmin % 1)


def _scaled(start: Start, spec: QuantSpec) -> Array:
    view = BlockView.of(start.weight.shape, spec)
    return view.merge(view.split(start.weight) / view.split_scale(effective_scale(start.range)))


def _floor(start: Start, spec: QuantSpec) -> Array:
    """The level below each weight, of the grid that reaches on for ever."""
    return jnp.floor(_scaled(start, spec) - _shift(spec)) + _shift(spec)


def _fraction(start: Start, spec: QuantSpec) -> Array:
    return _scaled(start, spec) - _floor(start, spec)
