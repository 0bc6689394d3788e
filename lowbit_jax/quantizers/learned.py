"""Quantizers whose scale is learned."""

import dataclasses
import math
from typing import ClassVar, Literal, override

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from lowbit_jax import calibrate
from lowbit_jax.blocks import BlockView, rounded_cast
from lowbit_jax.calibrate import Range
from lowbit_jax.estimators import lsq, scaled_gradient, ste
from lowbit_jax.formats import IntGrid
from lowbit_jax.quantizers.base import Quantizer, State


@dataclasses.dataclass(frozen=True)
class LSQ(Quantizer):
    """Learned step size (arXiv:1902.08153): the scale is a parameter with the gradient of Eq. 3.

    Two deviations, both stated by an argument or here: the scale starts from a search for the least
    squared error (`start`), which at 3 bits and fewer is far better than the paper's 2 mean|w| /
    sqrt(Qp); and a scale that training drives below the smallest one that can be stored is used at
    that value, with its gradient passed on, so that it can come back.

    Attributes:
        start: "mse" (searched), "paper" (2 mean|w| / sqrt(Qp)) or "absmax".
        gradient_scale: Whether the scale's gradient is multiplied by 1 / sqrt(N Qp) (section 2.2).
    """

    start: Literal["mse", "paper", "absmax"] = "mse"
    gradient_scale: bool = True

    trainable: ClassVar[tuple[str, ...]] = ("scale",)

    def __post_init__(self):
        super().__post_init__()
        if self.spec.has_global_scale or not isinstance(self.spec.format, IntGrid):
            raise NotImplementedError(
                "LSQ: the gradient of Eq. 3 is that of integer grids with one level of scales, "
                f"not of {self.spec.format.name} with {self.spec.scale_format.name} scales."
            )
        if self.start not in ("mse", "paper", "absmax"):
            raise ValueError(f"LSQ: start={self.start!r} is not of ['mse', 'paper', 'absmax'].")

    @override
    def init(self, x: Float[Array, "..."]) -> State:
        if self.start == "mse":
            return {"scale": calibrate.mse(x, self.spec).scale}
        if self.start == "absmax":
            return {"scale": calibrate.absmax(x, self.spec).scale}
        mean = calibrate.absmean(x, self.spec, eps=0.0).scale
        return {"scale": mean * np.float32(2 / math.sqrt(self._largest_level))}

    @override
    def range(self, x: Float[Array, "..."], state: State) -> Range:
        return Range(self.spec.scale_format.round(state["scale"].astype(jnp.float32)))

    @override
    def fake_quant(self, x: Float[Array, "..."], state: State) -> Float[Array, "..."]:
        view = BlockView.of(x.shape, self.spec)
        scale = state["scale"].astype(jnp.float32)
        if self.gradient_scale:
            factor = 1 / math.sqrt(view.block_size * self._largest_level)
            scale = scaled_gradient(scale, factor)
        scale = view.split_scale(ste(scale, self.range(x, state).scale))
        x32 = view.split(x.astype(jnp.float32))
        return rounded_cast(view.merge(lsq(x32, scale, self.spec.format)), x.dtype)

    @property
    def _largest_level(self) -> float:
        """Q_P of the paper."""
        assert isinstance(self.spec.format, IntGrid)
        return self.spec.format.qmax
