"""Activations as the kernels take them: rounded to 8 bits per row, or as a sum of bfloat16 numbers.

**Rounding** (`act`) is symmetric and dynamic, one scale a row: scale = absmax / 127 (int8, codes
-127 .. 127) or absmax / 448 (e4m3), nearest with ties to even. A row that holds NaN or infinity has
the scale NaN, so that its whole result is NaN and no garbage code is ever seen.

**Parts.** Tensor cores and MXUs multiply 16-bit numbers. A float32 number is exactly the sum of
three bfloat16 numbers (24 bits are 3 * 8) and a float16 number of two, so wide activations are
stacked as 3 M or 2 M rows and the results summed: the products are exact, as they are for bfloat16,
and while M is small the extra rows cost nothing, because a decode step is bound by the weights.
"""

from typing import Final, Literal

import jax
import jax.numpy as jnp
import numpy as np

LARGEST: Final = {"int8": 127.0, "fp8": 448.0}
PARTS: Final = {"bfloat16": 1, "float16": 2, "float32": 3}


def quantize_rows(x: jax.Array, act: Literal["int8", "fp8"]) -> tuple[jax.Array, jax.Array]:
    """Rounds each row to 8 bits: nearest, ties to even.

    Args:
        x: Activations [M, K].
        act: "int8" or "fp8".

    Returns:
        Codes, int8 or float8_e4m3fn [M, K], and the scale, float32 [M, 1]: 1 where a row is zero,
        NaN where it is not finite.
    """
    x = x.astype(jnp.float32)
    absmax = jnp.max(jnp.abs(x), axis=1, keepdims=True)
    scale = absmax * np.float32(1 / LARGEST[act])
    scale = jnp.where(scale > 0, scale, jnp.ones_like(scale))
    finite = jnp.isfinite(absmax)
    # By the reciprocal, as everywhere: XLA makes it of some divisions and not of others.
    levels = jnp.where(finite, x * (1 / scale), jnp.zeros_like(x))
    levels = jnp.clip(levels, -LARGEST[act], LARGEST[act])
    if act == "int8":
        codes = jnp.round(levels).astype(jnp.int8)
    else:
        codes = levels.astype(jnp.float8_e4m3fn)
    return codes, jnp.where(finite, scale, jnp.full_like(scale, jnp.nan))


def truncated(x: jax.Array) -> jax.Array:
    """The bfloat16 number of the same leading 8 bits, in float32: towards zero, never overflows."""
    bits = jax.lax.bitcast_convert_type(x, jnp.uint32) & jnp.uint32(0xFFFF0000)
    return jax.lax.bitcast_convert_type(bits, jnp.float32)


def split(x: jax.Array) -> jax.Array:
    """Stacks the bfloat16 parts of `x`: bfloat16 [parts, M, K], whose sum over parts is `x`.

    Infinity stands in the first part alone and NaN in each, so that both propagate.
    """
    count = PARTS[x.dtype.name]
    if count == 1:
        return x[None]
    rest, parts = x.astype(jnp.float32), []
    for _ in range(count):
        high = truncated(rest)
        parts.append(high.astype(jnp.bfloat16))
        rest = jnp.where(jnp.isinf(rest), jnp.zeros_like(rest), rest - high)
    return jnp.stack(parts)
