"""Weights whose values are learned themselves: TTQ's two magnitudes, LQ-Nets' basis.

The scale of both is 1: their values are absolute, and lie in the QTensor's basis.
"""

import dataclasses
from typing import ClassVar, override

import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Float

from lowbit_jax import formats
from lowbit_jax.blocks import BlockView, pinned
from lowbit_jax.formats import Learned
from lowbit_jax.grid import Range, coded
from lowbit_jax.quantizers.base import State
from lowbit_jax.quantizers.reshaped import Reshaped, constant_range, expand
from lowbit_jax.rounding import flushed
from lowbit_jax.scale_formats import FLOAT32

# A magnitude times a scale of 1 must be a normal number in every program.
_SMALLEST = np.float32(FLOAT32.smallest)


@dataclasses.dataclass(frozen=True)
class TTQ(Reshaped):
    """Trained ternary quantization (arXiv:1612.01064): -W_n, 0 and W_p, both magnitudes learned.

    The threshold is t max |w| (the paper's first heuristic, t = 0.05); weights above it are W_p,
    those below minus it -W_n, the others 0 (Eq. 6). The derivative by W_p is the sum over the
    weights at W_p, that by W_n minus the sum over those at -W_n: the derivative of the value, where
    the paper's Eq. 7 leaves its sign to the reader. That by w is W_p, 1 or W_n times that of the
    value (Eq. 8). Both magnitudes start at the mean of the weights that they stand for. Deviation:
    one that training drives to zero or below is used at the smallest positive scale, and its
    gradient is passed on.

    Attributes:
        threshold: t, in units of max |w|.
    """

    threshold: float = 0.05

    trainable: ClassVar[tuple[str, ...]] = ("positive_scale", "negative_scale")
    takes: ClassVar = (formats.TERNARY_LEARNED,)
    learns_values: ClassVar[bool] = True

    @override
    def __post_init__(self):
        super().__post_init__()
        if not 0 <= self.threshold < 1:
            raise ValueError(f"TTQ: threshold={self.threshold} is not in [0, 1).")

    def _sides(self, x: Array) -> tuple[Array, Array]:
        """Where x is above the threshold, and where below minus it."""
        x = flushed(x)
        largest = BlockView.of(x.shape, self.spec).reduce(jnp.max, jnp.abs(x))
        limit = expand(pinned(largest * np.float32(self.threshold)), x, self)
        return x > limit, x < -limit

    @override
    def init(self, x: Float[Array, "..."]) -> State:
        x = x.astype(jnp.float32)
        view = BlockView.of(x.shape, self.spec)

        def mean(where: Array) -> Array:
            total = view.reduce(jnp.sum, jnp.where(where, jnp.abs(x), 0.0))
            count = view.reduce(jnp.sum, where.astype(jnp.float32))
            return total / jnp.maximum(count, 1.0)

        above, below = self._sides(x)
        return {"positive_scale": mean(above), "negative_scale": mean(below)}

    @override
    def range(self, x: Float[Array, "..."], state: State) -> Range:
        used = [
            jnp.maximum(state[name].astype(jnp.float32), _SMALLEST)
            for name in ("negative_scale", "positive_scale")
        ]
        # The two rows of a block lie next to each other.
        basis = jnp.stack(used, axis=-2)
        *lead, k, _, n = basis.shape
        return constant_range(x, self, 1.0)._replace(basis=basis.reshape(*lead, k * 2, n))

    @override
    def reshaped(self, x: Float[Array, "..."], state: State, range_: Range) -> Array:
        above, below = self._sides(x)
        low, zero, high = self._values(x, range_)
        value = jnp.where(above, high, jnp.where(below, low, zero))
        return jnp.where(jnp.isnan(x), x, value)

    def _values(self, x: Array, range_: Range) -> list[Array]:
        """The three values, each in the shape of x."""
        assert range_.basis is not None
        fmt = self.spec.format
        assert isinstance(fmt, Learned)
        return [expand(value, x, self) for value in fmt.values(range_.basis)]

    @override
    def slopes(
        self, x: Float[Array, "..."], x_hat: Array, state: State, range_: Range
    ) -> dict[str, Array]:
        above, below = self._sides(x)
        low, _, high = self._values(x, range_)
        return {
            "x": jnp.where(above, high, jnp.where(below, -low, jnp.ones_like(x))),
            "positive_scale": above.astype(jnp.float32),
            "negative_scale": -below.astype(jnp.float32),
        }


@dataclasses.dataclass(frozen=True)
class LQNets(Reshaped):
    """LQ-Nets' weights (arXiv:1807.10029): the values are sums +-v_1 .. +-v_K of a learned basis v.

    w is rounded to the nearest of the 2**K values (its Eq. 5), straight-through. The basis has no
    gradient: it minimizes ||B^T v - w||^2 by the paper's quantization error minimization. With the
    signs B of the nearest values, its best basis is v* = (B B^T)^-1 B w, and behind every update
    of the weights v becomes `momentum` v + (1 - momentum) v*. Here that step is `observe`, which a
    training step calls by `observe_kernels`; v is a statistic. It starts from equidistant values of
    least squared error for a normal distribution (J. Max, 1960), improved by `start_steps` steps
    without an average. Where B has dependent rows (all weights of a block at fewer values than the
    basis needs), the least change of v is taken.

    Attributes:
        momentum: Share of the old basis in [0, 1); the paper's average has 0.9.
        start_steps: Steps before training.
    """

    momentum: float = 0.9
    start_steps: int = 20

    takes: ClassVar = (formats.BASIS2, formats.BASIS3, formats.BASIS4)
    observes: ClassVar[bool] = True
    learns_values: ClassVar[bool] = True

    @override
    def __post_init__(self):
        super().__post_init__()
        if not 0 <= self.momentum < 1:
            raise ValueError(f"LQNets: momentum={self.momentum} is not in [0, 1).")
        if self.start_steps < 0:
            raise ValueError(f"LQNets: start_steps={self.start_steps} is negative.")

    @override
    def init(self, x: Float[Array, "..."]) -> State:
        x = x.astype(jnp.float32)
        # Max's distance between equidistant values of a normal variable of variance 1.
        step = {2: 0.9957, 3: 0.586, 4: 0.3352}[self.spec.bits]
        mean_square = BlockView.of(x.shape, self.spec).reduce(jnp.mean, x * x)
        unit = jnp.sqrt(mean_square) * np.float32(step / 2)
        basis = jnp.stack([unit * np.float32(2.0**p) for p in range(self.spec.bits)], axis=-2)
        *lead, k, p, n = basis.shape
        basis = basis.reshape(*lead, k * p, n)
        basis = lax.fori_loop(0, self.start_steps, lambda _, v: self._fitted(x, v), basis)
        return {"basis": basis}

    @override
    def observe(self, x: Float[Array, "..."], state: State) -> State:
        old = state["basis"].astype(jnp.float32)
        fitted = self._fitted(x.astype(jnp.float32), old)
        return {"basis": old + (fitted - old) * np.float32(1 - self.momentum)}

    def _fitted(self, x: Array, basis: Array) -> Array:
        """The basis of least squared error for the signs that the given one rounds to."""
        view, bits = BlockView.of(x.shape, self.spec), self.spec.bits
        range_ = constant_range(x, self, 1.0)._replace(basis=basis)
        codes = coded(view.split(x), self.spec, range_, view)
        signs = [
            view.merge(jnp.where(codes >> p & 1, np.float32(1), np.float32(-1)))
            for p in range(bits)
        ]

        def mean(product: Array) -> Array:
            return view.reduce(jnp.mean, product)

        gram = jnp.stack([jnp.stack([mean(a * b) for b in signs], -1) for a in signs], -2)
        split = basis.reshape(*basis.shape[:-2], -1, bits, basis.shape[-1]).swapaxes(-1, -2)
        residual = x - sum(s * expand(split[..., p], x, self) for p, s in enumerate(signs))
        # The change of v, rather than v itself: its least one, where several fit alike.
        wanted = jnp.stack([mean(s * residual) for s in signs], -1)
        eigenvalues, vectors = jnp.linalg.eigh(gram)
        kept = eigenvalues > np.float32(1e-4)
        inverse = jnp.where(kept, 1 / jnp.where(kept, eigenvalues, 1.0), 0.0)
        change = jnp.einsum("...ip,...p,...jp,...j->...i", vectors, inverse, vectors, wanted)
        return basis + change.swapaxes(-1, -2).reshape(basis.shape)

    @override
    def range(self, x: Float[Array, "..."], state: State) -> Range:
        return constant_range(x, self, 1.0)._replace(basis=state["basis"].astype(jnp.float32))

    @override
    def slopes(
        self, x: Float[Array, "..."], x_hat: Array, state: State, range_: Range
    ) -> dict[str, Array]:
        return {"x": jnp.ones_like(x)}
