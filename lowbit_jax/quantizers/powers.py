"""Weights at powers of two and sums of two of them: INQ's range, APoT's learned one."""

import dataclasses
import math
from typing import ClassVar, override

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from lowbit_jax import formats
from lowbit_jax.blocks import BlockView, divided, pinned
from lowbit_jax.grid import Range
from lowbit_jax.quantizers.base import State
from lowbit_jax.quantizers.ranges import StraightThrough
from lowbit_jax.quantizers.reshaped import Reshaped, expand
from lowbit_jax.scale_formats import E8M0


@dataclasses.dataclass(frozen=True)
class INQ(StraightThrough):
    """Powers of two and zero, the largest 2**n_1 (arXiv:1702.03044, Eqs. 2 to 4).

    n_1 = floor(log2(4 max |w| / 3)); rounding is to the nearest, which for neighbouring powers of
    two is the paper's Eq. 4. The paper's training freezes weights step by step, and is
    `optimizers.incremental`. Deviation: with b bits there are 2**(b-1) - 1 magnitudes; the paper
    spends a bit on the zero, and has half as many.
    """

    def __post_init__(self):
        super().__post_init__()
        if self.spec.format not in (formats.POW2_3, formats.POW2_4):
            raise NotImplementedError(
                f"INQ: its values are powers of two, pow2_3 or pow2_4, not {self.spec.format.name}."
            )
        if self.spec.scale_format != E8M0:
            raise NotImplementedError(
                f"INQ: its scale is a power of two, rounded down: use E8M0, not "
                f"{self.spec.scale_format.key}."
            )

    @override
    def range(self, x: Float[Array, "..."], state: State) -> Range:
        largest = BlockView.of(x.shape, self.spec).reduce(jnp.max, jnp.abs(x.astype(jnp.float32)))
        return Range(pinned(E8M0.round(pinned(largest * np.float32(4 / 3)))))


@dataclasses.dataclass(frozen=True)
class APoT(Reshaped):
    """Additive powers of two with a learned clipping alpha (arXiv:1909.13144).

    w_hat = alpha Pi(clip(w / alpha, -1, 1)), Pi rounding to the nearest sum of powers of two whose
    largest is 1 (`apot5` over its largest value). The derivative by w is 1[|w| <= alpha], by alpha
    `w_hat / alpha - w / alpha` inside and sign(w) outside: the paper's reparameterized clipping.
    Alpha starts at `start` standard deviations (about zero). Left out: the paper normalizes weights
    by their mean and deviation first, and scales no gradient; here it is that of LSQ,
    1 / sqrt(n), as elsewhere in this library.

    Attributes:
        start: alpha at the beginning, in standard deviations.
    """

    start: float = 3.0

    trainable: ClassVar[tuple[str, ...]] = ("alpha_scale",)
    takes: ClassVar = (formats.APOT5, formats.POW2_3, formats.POW2_4)

    @override
    def __post_init__(self):
        super().__post_init__()
        if not self.start > 0:
            raise ValueError(f"APoT: start={self.start} is not positive.")

    @override
    def init(self, x: Float[Array, "..."]) -> State:
        x = x.astype(jnp.float32)
        mean_square = BlockView.of(x.shape, self.spec).reduce(jnp.mean, x * x)
        return {"alpha_scale": jnp.sqrt(mean_square) * np.float32(self.start)}

    @override
    def range(self, x: Float[Array, "..."], state: State) -> Range:
        alpha = state["alpha_scale"].astype(jnp.float32)
        return Range(
            pinned(self.spec.scale_format.round(alpha * np.float32(1 / self.spec.format.max)))
        )

    @override
    def slopes(
        self, x: Float[Array, "..."], x_hat: Array, state: State, range_: Range
    ) -> dict[str, Array]:
        block = BlockView.of(x.shape, self.spec).block_size
        alpha = expand(range_.scale * np.float32(self.spec.format.max), x, self)
        share, level = divided(x, alpha), divided(x_hat, alpha)
        inside = jnp.abs(share) <= 1
        each = level - jnp.where(inside, share, jnp.zeros_like(share))
        return {
            "x": inside.astype(jnp.float32),
            "alpha_scale": each * np.float32(1 / math.sqrt(block)),
        }
