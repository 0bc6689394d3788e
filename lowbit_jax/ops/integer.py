"""A product of integer codes in the forward pass, with the gradients of the float product.

With symmetric integers on both sides and scales that do not run along K, x_hat @ w_hat is
(x_codes @ w_codes) * (x_scale * w_scale): one int8 product, exact in int32, and two factors. XLA's
int8 product takes less time than float32 on many CPUs, and has twice the rate of bfloat16 on TPUs
and Hopper.
"""

import dataclasses
import functools
from typing import Any, Protocol

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Int8

from lowbit_jax.blocks import BlockView
from lowbit_jax.formats import Format, IntGrid
from lowbit_jax.grid import Range, to_levels
from lowbit_jax.spec import QuantSpec


class Contraction(Protocol):
    """A bilinear operation of two arrays; hashable."""

    def __call__(
        self, x: Array, w: Array, *, preferred_element_type: jnp.dtype, precision: Any = None
    ) -> Array:
        """The result as `preferred_element_type`; `precision` overrides the operation's own."""


@dataclasses.dataclass(frozen=True)
class DotGeneral:
    """`lax.dot_general` with its dimension numbers."""

    dimension_numbers: lax.DotDimensionNumbers
    precision: Any = None

    def __call__(
        self, x: Array, w: Array, *, preferred_element_type: jnp.dtype, precision: Any = None
    ) -> Array:
        """See `Contraction`."""
        return lax.dot_general(
            x,
            w,
            self.dimension_numbers,
            precision=precision or self.precision,
            preferred_element_type=preferred_element_type,
        )


@dataclasses.dataclass(frozen=True)
class EinsumProduct:
    """`jnp.einsum` with its equation."""

    equation: str
    precision: Any = None

    def __call__(
        self, x: Array, w: Array, *, preferred_element_type: jnp.dtype, precision: Any = None
    ) -> Array:
        """See `Contraction`."""
        return jnp.einsum(
            self.equation,
            x,
            w,
            precision=precision or self.precision,
            preferred_element_type=preferred_element_type,
        )


def check_integer(spec: QuantSpec, what: str) -> None:
    """Raises NotImplementedError unless the spec's codes can be multiplied as int8, saying why."""
    fmt: Format = spec.format
    granularity = spec.granularity
    whole_k = granularity.k is None and getattr(granularity, "n", None) in (None, 1)
    if not (isinstance(fmt, IntGrid) and fmt.signed and float(fmt.qmin).is_integer()):
        raise NotImplementedError(
            f"int8 product: {what} of format {fmt.name} are not symmetric integers. Use "
            "product='float'."
        )
    if not whole_k or spec.has_global_scale:
        raise NotImplementedError(
            f"int8 product: {what} have scales in blocks ({spec.describe()}), which cannot be "
            "taken out of the sum. Use one scale per tensor, channel or token, or product='float'."
        )


def integer_levels(x: Array, spec: QuantSpec, range_: Range) -> Int8[Array, "..."]:
    """The integers that an array's codes stand for, as int8."""
    view = BlockView.of(x.shape, spec)
    levels = spec.format.round(to_levels(x, spec, range_, view))
    return view.merge(levels).astype(jnp.int8)


@functools.partial(jax.custom_vjp, nondiff_argnums=(6, 7))
def integer_product(
    x_hat: Float[Array, "..."],
    w_hat: Float[Array, "..."],
    x_levels: Int8[Array, "..."],
    x_scale: Float[Array, "..."],
    w_levels: Int8[Array, "..."],
    w_scale: Float[Array, "..."],
    contract: Contraction,
    dtype: jnp.dtype,
) -> Float[Array, "..."]:
    """contract(x_hat, w_hat), computed from the integers; differentiated as the float product.

    Args:
        x_hat: x_levels * x_scale, through which gradients flow to the activations.
        w_hat: w_levels * w_scale, through which gradients flow to the kernel.
        x_levels: Integers of the activations.
        x_scale: 1 along contracted axes.
        w_levels: Integers of the kernel.
        w_scale: 1 along contracted axes.
        contract: The operation.
        dtype: Of the result.
    """
    total = contract(x_levels, w_levels, preferred_element_type=jnp.dtype(jnp.int32))
    # The same operation on the scales, whose contracted axes have length 1, lays them over the
    # result; in full precision, since a TPU would round them to bfloat16 first.
    scale = contract(
        x_scale,
        w_scale,
        preferred_element_type=jnp.dtype(jnp.float32),
        precision=lax.Precision.HIGHEST,
    )
    return (total.astype(jnp.float32) * scale).astype(dtype)


def _fwd(x_hat, w_hat, x_levels, x_scale, w_levels, w_scale, contract, dtype):
    y = integer_product(x_hat, w_hat, x_levels, x_scale, w_levels, w_scale, contract, dtype)
    return y, (x_hat, w_hat)


def _bwd(contract, dtype, residuals, g):
    x_hat, w_hat = residuals

    def product(x, w):
        return contract(x, w, preferred_element_type=dtype)

    _, vjp = jax.vjp(product, x_hat, w_hat)
    return (*vjp(g), None, None, None, None)


integer_product.defvjp(_fwd, _bwd)
