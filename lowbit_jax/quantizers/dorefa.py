"""DoReFa-Net's weights; its gradients are `estimators.quantized_gradient`."""

import dataclasses
from typing import ClassVar, override

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from lowbit_jax import formats
from lowbit_jax.blocks import divided, pinned, reduce_matrix
from lowbit_jax.grid import Range
from lowbit_jax.quantizers.base import State
from lowbit_jax.quantizers.reshaped import Reshaped, constant_range
from lowbit_jax.spec import PerTensor


@dataclasses.dataclass(frozen=True)
class DoReFa(Reshaped):
    """DoReFa-Net's k-bit weights (arXiv:1606.06160, Eq. 9): per tensor, in [-1, 1].

    w_hat = 2 quantize(tanh w / (2 max |tanh w|) + 1/2) - 1, quantize rounding to multiples of
    1 / (2**k - 1): the half-shifted levels of k bits at the scale 2 / (2**k - 1). The gradient
    passes the rounding straight and goes through tanh, with the maximum a constant:
    (1 - tanh(w)**2) / max |tanh w|. One bit is `Sign` or `AbsMean`, as in the paper's Eq. 7.
    """

    takes: ClassVar = (
        formats.INT2_HALF, formats.INT3_HALF, formats.INT4_HALF, formats.INT5_HALF,
        formats.INT6_HALF, formats.INT7_HALF, formats.INT8_HALF,
    )  # fmt: skip

    @override
    def __post_init__(self):
        super().__post_init__()
        if self.spec.granularity != PerTensor():
            raise ValueError(
                f"DoReFa: its maximum is that of the tensor, so PerTensor(), not "
                f"{self.spec.granularity}."
            )

    @override
    def range(self, x: Float[Array, "..."], state: State) -> Range:
        return constant_range(x, self, 1 / self.spec.format.max)

    def _largest(self, bent: Array) -> Array:
        largest = reduce_matrix(jnp.max, jnp.abs(bent), self.spec)
        return pinned(jnp.maximum(largest, np.float32(2.0**-100)))  # of all zeros

    @override
    def reshaped(self, x: Float[Array, "..."], state: State, range_: Range) -> Array:
        bent = pinned(jnp.tanh(x))
        return pinned(divided(bent, self._largest(bent)))

    @override
    def slopes(
        self, x: Float[Array, "..."], x_hat: Array, state: State, range_: Range
    ) -> dict[str, Array]:
        bent = jnp.tanh(x)
        return {"x": divided(1 - bent * bent, self._largest(bent))}
