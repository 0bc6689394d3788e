"""Quantizers whose range is a function of the array; their gradients are straight-through."""

import dataclasses
from typing import ClassVar, override

import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Float

from lowbit_jax import calibrate
from lowbit_jax.blocks import pinned
from lowbit_jax.calibrate import Range
from lowbit_jax.estimators import ste
from lowbit_jax.grid import snap
from lowbit_jax.quantizers.base import Quantizer, State, as_row
from lowbit_jax.spec import Block


class StraightThrough(Quantizer):
    """A quantizer whose gradient is that of the identity, range included."""

    shared_part: ClassVar[bool] = True

    @override
    def fake_quant(self, x: Float[Array, "..."], state: State) -> Float[Array, "..."]:
        constant = lax.stop_gradient(x)
        return ste(x, snap(constant, self.spec, self.range(constant, state)))


@dataclasses.dataclass(frozen=True)
class Absmax(StraightThrough):
    """Symmetric, scale from the largest magnitude of each block, found anew at every call.

    Weights: `2 absmax / (2**b - 1)`, GPTQ's convention. Activations: per token with a narrow int8,
    BitNet b1.58's `absmax / 127` (arXiv:2402.17764). See `calibrate.absmax` for MX and NVFP4
    scales.

    Attributes:
        share: Share of the largest magnitude that the range covers, in (0, 1]; QuaRot clips 4-bit
            activations to 0.9 (arXiv:2404.00456, section 5).
    """

    share: float = 1.0

    two_levels: ClassVar[bool] = True

    def __post_init__(self):
        super().__post_init__()
        if not 0 < self.share <= 1:
            raise ValueError(f"Absmax: share={self.share} is not in (0, 1].")
        if self.spec.has_global_scale and not isinstance(self.spec.granularity, Block):
            raise ValueError(
                "Absmax: a global scale found per call would couple the rows of a batch; "
                "activations with e4m3 scales use StaticAbsmax, which is calibrated."
            )

    @override
    def range(self, x: Float[Array, "..."], state: State) -> Range:
        full = calibrate.absmax(x, self.spec)
        if self.share == 1:
            return full
        clipped = pinned(full.scale * np.float32(self.share))
        stored = calibrate.stored_scale(clipped, self.spec)
        return stored._replace(global_scale=full.global_scale)


@dataclasses.dataclass(frozen=True)
class MinMax(StraightThrough):
    """Asymmetric, scale and integer zero point from the extremes of each block, per call."""

    symmetric: ClassVar[bool] = False
    two_levels: ClassVar[bool] = True

    @override
    def range(self, x: Float[Array, "..."], state: State) -> Range:
        return calibrate.minmax(x, self.spec)


@dataclasses.dataclass(frozen=True)
class AbsMean(StraightThrough):
    """Scale = mean |w|, a function of w, never stored while training.

    With the ternary format BitNet b1.58's weight quantizer (arXiv:2402.17764, Eq. 1 to 3); with the
    binary format sign(w) * mean |w| (XNOR-Net, arXiv:1603.05279, Eq. 6), with the identity as its
    gradient.

    Attributes:
        eps: Smallest scale.
    """

    eps: float = 1e-5

    two_levels: ClassVar[bool] = True

    def __post_init__(self):
        super().__post_init__()
        if self.spec.has_global_scale:
            raise NotImplementedError("AbsMean: one scale level only; NVFP4's ranges are Absmax's.")

    @override
    def range(self, x: Float[Array, "..."], state: State) -> Range:
        return calibrate.absmean(x, self.spec, eps=self.eps)


@dataclasses.dataclass(frozen=True)
class StaticAbsmax(StraightThrough):
    """Symmetric, from the largest magnitude seen while calibrating: for activations.

    With e4m3 scales (NVFP4) the statistic is the global scale's, and the scales of the blocks
    follow each call; with other scales it is the one scale of the tensor. Until it is calibrated
    the statistic is NaN, and so is every
    result: nothing runs unnoticed on a range that nobody measured.

    Attributes:
        momentum: Share of the old statistic in a moving average, in [0, 1); 0.9 to 0.99 are usual
            (arXiv:1712.05877, section 3.1). None: the largest magnitude of all.
    """

    momentum: float | None = None

    def __post_init__(self):
        super().__post_init__()
        if self.momentum is not None and not 0 <= self.momentum < 1:
            raise ValueError(f"StaticAbsmax: momentum={self.momentum} is not in [0, 1).")
        whole = self.spec.granularity == Block(None, None)
        if not (whole or self.spec.has_global_scale):
            raise ValueError(
                f"StaticAbsmax: one statistic per tensor, so PerTensor() or e4m3 scales, not "
                f"{self.spec.granularity} with {self.spec.scale_format.name} scales."
            )

    @override
    def init(self, x: Float[Array, "..."]) -> State:
        return {"absmax": jnp.full((*x.shape[:-2], 1, 1), jnp.nan, jnp.float32)}

    @override
    def observe(self, x: Float[Array, "..."], state: State) -> State:
        seen = state["absmax"]
        largest = jnp.reshape(jnp.max(jnp.abs(x.astype(jnp.float32))), seen.shape)
        if self.momentum is None:
            return {"absmax": jnp.fmax(seen, largest)}  # fmax: the NaN of "never seen" gives way
        mean = seen + (largest - seen) * np.float32(1 - self.momentum)
        return {"absmax": jnp.where(jnp.isnan(seen), largest, mean)}

    @override
    def range(self, x: Float[Array, "..."], state: State) -> Range:
        absmax = as_row(state["absmax"], x.ndim)
        if self.spec.has_global_scale:
            return calibrate.absmax(x, self.spec, global_absmax=absmax)
        scale = calibrate.absmax(absmax, self.spec).scale
        return Range(jnp.broadcast_to(scale, self.spec.scale_shape(x.shape)))
