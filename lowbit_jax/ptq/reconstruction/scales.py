"""Variables that move the range."""

import dataclasses
from typing import override

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

from lowbit_jax.grid import Range
from lowbit_jax.ptq.reconstruction.variables import Parameters, Start, Variable
from lowbit_jax.spec import QuantSpec


@dataclasses.dataclass(frozen=True)
class RangeShare(Variable):
    """AutoRound's min-max tuning: both ends of the range times a share in [0, 1] that is learned.

    scale = (max beta - min alpha) / (2**b - 1) (arXiv:2309.05516, section 3.1); a symmetric range
    has one share. Both start at 1.
    """

    lr: float = 5e-3

    @override
    def init(self, start: Start, spec: QuantSpec) -> Parameters:
        ones = jnp.ones_like(start.range.scale)
        return {"high": ones} if spec.symmetric else {"high": ones, "low": ones}

    @override
    def range(self, parameters: Parameters, range_: Range, spec: QuantSpec) -> Range:
        return _shrunk(range_, spec, parameters["high"], parameters.get("low"))

    @override
    def project(self, parameters: Parameters) -> Parameters:
        # A range of nothing has no levels: a little is left.
        return {name: jnp.clip(share, 0.01, 1.0) for name, share in parameters.items()}


@dataclasses.dataclass(frozen=True)
class LearnedClipping(Variable):
    """OmniQuant's learnable weight clipping (arXiv:2308.13137, Eq. 2).

    scale = (sigmoid(gamma) max - sigmoid(beta) min) / (2**b - 1); both start at 4, almost 1. A
    symmetric range has one.
    """

    lr: float = 1e-2

    @override
    def init(self, start: Start, spec: QuantSpec) -> Parameters:
        fours = jnp.full_like(start.range.scale, 4.0)
        return {"high": fours} if spec.symmetric else {"high": fours, "low": fours}

    @override
    def range(self, parameters: Parameters, range_: Range, spec: QuantSpec) -> Range:
        shares = {name: jax.nn.sigmoid(value) for name, value in parameters.items()}
        return _shrunk(range_, spec, shares["high"], shares.get("low"))


@dataclasses.dataclass(frozen=True)
class Scales(Variable):
    """Scales learned as their logarithms' distance from the start, which keeps them positive.

    EfficientQAT (arXiv:2407.11062) and LSQ learn the scale itself; in the logarithm one learning
    rate fits layers of every magnitude.
    """

    lr: float = 1e-3

    @override
    def init(self, start: Start, spec: QuantSpec) -> Parameters:
        return {"log": jnp.zeros_like(start.range.scale)}

    @override
    def range(self, parameters: Parameters, range_: Range, spec: QuantSpec) -> Range:
        return range_._replace(scale=range_.scale * jnp.exp(parameters["log"]))


@dataclasses.dataclass(frozen=True)
class ZeroPoints(Variable):
    """Zero points of asymmetric ranges, learned straight-through (EfficientQAT)."""

    lr: float = 1e-2

    @override
    def init(self, start: Start, spec: QuantSpec) -> Parameters:
        zero = start.range.zero_point
        return {} if zero is None else {"shift": jnp.zeros_like(zero)}

    @override
    def range(self, parameters: Parameters, range_: Range, spec: QuantSpec) -> Range:
        if range_.zero_point is None:
            return range_
        return range_._replace(zero_point=range_.zero_point + parameters["shift"])


def _shrunk(range_: Range, spec: QuantSpec, high: Array, low: Array | None) -> Range:
    """The range with its ends multiplied by shares."""
    if low is None or range_.zero_point is None:
        return range_._replace(scale=range_.scale * high)
    levels = np.float32(spec.format.max)
    bottom = -range_.zero_point * range_.scale * low
    top = (levels - range_.zero_point) * range_.scale * high
    scale = jnp.maximum((top - bottom) * np.float32(1 / spec.format.max), np.float32(1e-12))
    return range_._replace(scale=scale, zero_point=-bottom / scale)
