"""How `matmul(act=...)` rounds activations."""

from typing import Final

from jaxtyping import Array, Float

from lowbit_jax import estimators
from lowbit_jax.calibrate import absmax
from lowbit_jax.formats import FP8_E4M3, INT8_NARROW
from lowbit_jax.grid import snap
from lowbit_jax.spec import PerToken, QuantSpec

SPECS: Final = {
    "int8": QuantSpec(format=INT8_NARROW, granularity=PerToken()),
    "fp8": QuantSpec(format=FP8_E4M3, granularity=PerToken()),
}
"""Per token, by the largest magnitude: int8 in -127 .. 127, or e4m3."""


def rounded(x: Float[Array, "*batch k"], act: str | None) -> Float[Array, "*batch k"]:
    """Activations on the grid of `act`; gradients pass straight through."""
    if act is None:
        return x
    spec = SPECS[act]
    return estimators.ste(x, snap(x, spec, absmax(x, spec)))
