"""HQQ: half-quadratic quantization, without data.

The error W - W_hat is split into a sparse part W_e and the rest, and two steps alternate (Badri and
Shaji, "Half-Quadratic Quantization", 2023, Eq. 4 to 6):

    W_e <- shrink_p(W - W_hat, beta);   z <- mean(Q - (W - W_e) / s);   beta <- kappa beta

with shrink_p(x, beta) = sign(x) max(|x| - |x|^(p - 1) / beta, 0), which minimises the l_p norm
(p < 1) of the error: few large errors count less than many small ones.

Differences: zero points end as integers, as every packed format stores them, so that the scale is
fitted too, s <- <Q - z, W - W_e> / <Q - z, Q - z>, since a rounded zero point alone moves little;
of all iterations the one of least l_p error is kept, block by block. It takes symmetric specs too,
where only the scale moves.
"""

import dataclasses
import functools
from typing import Any, ClassVar, override

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array

from lowbit_jax import calibrate
from lowbit_jax.blocks import BlockView
from lowbit_jax.grid import Range, snap
from lowbit_jax.ptq.ranges import snapped
from lowbit_jax.ptq.solver import LayerSolver
from lowbit_jax.ptq.stage import LayerProblem, LayerSolution
from lowbit_jax.spec import QuantSpec


@dataclasses.dataclass(frozen=True)
class HQQ(LayerSolver):
    """Half-quadratic quantization; needs no data.

    Attributes:
        norm: p.
        beta: At the start.
        kappa: What beta is multiplied by after every iteration.
        iterations: How many.
    """

    norm: float = 0.7
    beta: float = 10.0
    kappa: float = 1.01
    iterations: int = 20

    uses_data: ClassVar[bool] = False

    def __post_init__(self):
        if not 0 < self.norm <= 1:
            raise ValueError(f"HQQ: norm={self.norm} is not in (0, 1].")
        if self.beta <= 0 or self.kappa < 1 or self.iterations < 1:
            raise ValueError(
                f"HQQ: beta={self.beta}, kappa={self.kappa}, iterations={self.iterations}: must be "
                "> 0, >= 1 and >= 1."
            )

    @override
    def solve(self, problem: LayerProblem, key: jax.Array) -> LayerSolution:
        spec = problem.spec
        if spec.has_global_scale or spec.scale_format.name == "e8m0" or spec.second is not None:
            raise NotImplementedError(
                f"{problem.path}: HQQ moves scales freely, which those of {spec.describe()} "
                "cannot. Use RoundToNearest('mse')."
            )
        range_ = _solve(self, problem.spec, problem.weight)
        return LayerSolution(snapped(problem.weight, problem.spec, range_), range_)


@functools.partial(jax.jit, static_argnums=(0, 1))
def _solve(settings: HQQ, spec: QuantSpec, weight: Array) -> Range:
    view = BlockView.of(weight.shape, spec)
    start = calibrate.absmax(weight, spec) if spec.symmetric else calibrate.minmax(weight, spec)

    def error(range_: Range) -> Array:
        difference = jnp.abs(snap(weight, spec, range_) - weight)
        return view.reduce(jnp.sum, difference ** np.float32(settings.norm))

    def step(i: Array, carry: Any) -> Any:
        best, least, range_ = carry
        beta = settings.beta * jnp.float32(settings.kappa) ** i
        target = weight - _shrink(weight - snap(weight, spec, range_), beta, settings.norm)
        moved = _refitted(weight, target, range_, spec, view)
        found = error(moved)
        better = found < least
        best = jax.tree.map(lambda old, new: jnp.where(better, new, old), best, moved)
        return best, jnp.minimum(found, least), moved

    carry = (start, error(start), start)
    return lax.fori_loop(0, settings.iterations, step, carry)[0]


def _shrink(x: Array, beta: Array, p: float) -> Array:
    size = jnp.maximum(jnp.abs(x), np.float32(1e-8))
    return jnp.sign(x) * jnp.maximum(size - size ** np.float32(p - 1) / beta, 0.0)


def _refitted(
    weight: Array, target: Array, range_: Range, spec: QuantSpec, view: BlockView
) -> Range:
    """The range that fits the codes of the last one to the target."""
    scale = view.split_scale(range_.scale)
    levels = view.split(snap(weight, spec, range_)) / scale
    if range_.zero_point is not None:
        codes = levels + view.split_scale(range_.zero_point)
        zero = view.reduce(jnp.mean, view.merge(codes - view.split(target) / scale))
        zero = jnp.clip(jnp.round(zero), 0.0, np.float32(spec.format.max))
        levels = codes - view.split_scale(zero)
    else:
        zero = None
    over = view.reduce(jnp.sum, view.merge(levels * view.split(target)))
    under = view.reduce(jnp.sum, view.merge(levels * levels))
    fitted = jnp.where((over > 0) & (under > 0), over / jnp.maximum(under, 1e-12), range_.scale)
    return Range(spec.scale_format.round(fitted), zero)
