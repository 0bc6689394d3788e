"""How a solver finds the range of a kernel before it chooses codes."""

import functools
from typing import Literal

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from lowbit_jax import calibrate
from lowbit_jax.grid import Range, snap
from lowbit_jax.quantizers import LSQ, Quantizer
from lowbit_jax.spec import QuantSpec

RangeName = Literal["scheme", "minmax", "mse", "hessian"]
RANGES: tuple[RangeName, ...] = ("scheme", "minmax", "mse", "hessian")


def check_range(where: str, name: str) -> None:
    """Raises ValueError for an unknown way of finding ranges."""
    if name not in RANGES:
        raise ValueError(f"{where}: range={name!r} is not of {list(RANGES)}.")


@functools.partial(jax.jit, static_argnames=("spec", "how", "quantizer"))
def find_range(
    weight: Float[Array, "*stack k n"],
    spec: QuantSpec,
    how: RangeName,
    *,
    quantizer: Quantizer | None = None,
    importance: Float[Array, "*stack k"] | None = None,
) -> Range:
    """The range of a kernel.

    Args:
        weight: The kernel as a matrix.
        spec: How it is quantized.
        how: "scheme": as the scheme's own quantizer finds it; "minmax": from the extremes
            (symmetric: absmax); "mse": searched for the least error, with GPTQ's norm 2.4, grid
            100 and smallest share 0.2; "hessian": searched for the least squared error weighted by
            the inputs' second moments, the diagonal of the Hessian.
        quantizer: Of the scheme; for "scheme".
        importance: Diagonal of the Hessian; for "hessian", which is "mse" with norm 2 without it.
    """
    if how == "scheme" and quantizer is not None:
        state = quantizer.init(weight) if isinstance(quantizer, LSQ) else {}
        return quantizer.range(weight, state)
    if how in ("scheme", "minmax"):
        found = calibrate.absmax if spec.symmetric else calibrate.minmax
        return found(weight, spec)
    if how == "mse":
        return calibrate.mse(weight, spec, norm=2.4)
    rows = None if importance is None else jnp.maximum(importance, 0.0)[..., None]
    return calibrate.mse(weight, spec, importance=rows)


snapped = jax.jit(snap, static_argnames="spec")
"""`grid.snap`, compiled."""
