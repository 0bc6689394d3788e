"""Exact pieces of rounding in float32, alike in every program: zeros, powers of two, minifloats."""

import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Float


def positive_zero(v: Float[Array, "*n"]) -> Float[Array, "*n"]:
    """`v` with -0.0 replaced by +0.0; NaN stays NaN."""
    # `v + 0.0` would be simplified away by XLA.
    return jnp.where(v == 0, jnp.zeros_like(v), v)


def flushed(v: Float[Array, "*n"]) -> Float[Array, "*n"]:
    """`v` with subnormal numbers replaced by zero, which some programs do and some do not."""
    return jnp.where(jnp.abs(v) < np.float32(2.0**-126), jnp.zeros_like(v), v)


def round_minifloat(
    v: Float[Array, "*n"], *, mantissa_bits: int, min_exponent: int, largest: float
) -> Float[Array, "*n"]:
    """Nearest value of a small float format, ties to even, saturating at +-`largest`.

    Exact in float32 and independent of the compiler: only powers of two are multiplied, and XLA's
    own conversions (which may round twice, or be removed as "excess precision") are not used.

    Args:
        v: float32.
        mantissa_bits: Stored bits of the mantissa.
        min_exponent: Exponent of the smallest normal number; below it the grid is uniform.
        largest: Largest magnitude of the format.
    """
    v = jnp.clip(v, -np.float32(largest), np.float32(largest))
    exponent = jnp.maximum(exponent_of(v), min_exponent) - mantissa_bits
    return positive_zero(jnp.round(v * exp2(-exponent)) * exp2(exponent))


def exponent_of(v: Float[Array, "*n"]) -> Array:
    """floor(log2(|v|)) of normal float32 numbers, as int32, read from the bits; -127 for zero."""
    bits = lax.bitcast_convert_type(v, jnp.int32)
    return ((bits >> 23) & 0xFF) - 127


def exp2(exponent: Array) -> Float[Array, "*n"]:
    """2**exponent, exactly, for exponents of normal float32 numbers."""
    return lax.bitcast_convert_type((exponent + 127) << 23, jnp.float32)
