"""QuEST's projection onto MXFP4, the forward rounding of Quartet."""

import dataclasses
from typing import ClassVar, override

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from lowbit_jax import calibrate, formats
from lowbit_jax.blocks import BlockView, divided, pinned
from lowbit_jax.grid import Range
from lowbit_jax.quantizers.base import State
from lowbit_jax.quantizers.reshaped import Reshaped, expand, inside
from lowbit_jax.scale_formats import E8M0, FLOAT32


@dataclasses.dataclass(frozen=True)
class QuEST(Reshaped):
    """e2m1 at the scale of least squared error for normal values, with a mask for its gradient.

    Quartet's forward pass (arXiv:2505.14669) after QuEST (arXiv:2502.05003), behind a Hadamard
    rotation that makes values normal. scale = 2.92247856 / 6 times the root mean square of a block:
    beyond 2.92 of them values saturate. The gradient passes where they do not (the trust mask) and
    is 0 where they do. With e8m0 scales (MXFP4) the scale is the nearest power of two, in the
    logarithm. The mean is a sum of integers, as in `calibrate.absmean`.

    Attributes:
        clip: Where values saturate, in root mean squares.
    """

    clip: float = 2.92247856

    takes: ClassVar = (formats.FP4_E2M1,)

    @override
    def __post_init__(self):
        super().__post_init__()
        if not self.clip > 0:
            raise ValueError(f"QuEST: clip={self.clip} is not positive.")

    @override
    def range(self, x: Float[Array, "..."], state: State) -> Range:
        x = x.astype(jnp.float32)
        view = BlockView.of(x.shape, self.spec)
        largest = pinned(
            jnp.maximum(view.reduce(jnp.max, jnp.abs(x)), np.float32(FLOAT32.smallest))
        )
        share = pinned(divided(x, expand(largest, x, self)))  # squares do not leave float32
        spec = dataclasses.replace(self.spec, scale_format=FLOAT32)
        root = pinned(jnp.sqrt(calibrate.absmean(share * share, spec, eps=0.0).scale))
        scale = pinned(pinned(largest * root) * np.float32(self.clip / self.spec.format.max))
        if self.spec.scale_format == E8M0:  # which rounds down
            scale = pinned(scale * np.float32(np.sqrt(2)))
        return Range(pinned(self.spec.scale_format.round(scale)))

    @override
    def slopes(
        self, x: Float[Array, "..."], x_hat: Array, state: State, range_: Range
    ) -> dict[str, Array]:
        return {"x": inside(x, range_, self)}
