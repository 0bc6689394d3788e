"""Words to weights in a Hopper kernel, in operations that Pallas lowers and interprets.

A code c of up to 8 bits becomes a float32 number without a conversion, of which the hardware does
few at a time: `c | 0x4B000000` read as float32 is 2**23 + c, and one exact subtraction leaves c -
d.
"""

from typing import Any, Final

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from kernels_pallas.activations import truncated
from kernels_pallas.gpu.layout import shift_of
from kernels_pallas.problem import Affine, Problem, Table, bfloat16_parts, integer_multiplier

_MAGIC_BITS: Final = 0x4B000000
_MAGIC: Final = 2.0**23


def field(planes: list[jax.Array], problem: Problem, index: int) -> jax.Array:
    """Codes of one chunk, int32 [64, C]: field `index` of the blocks of words, planes joined.

    Args:
        planes: For each plane the block of words that holds the chunk, int32 [64, C].
        problem: The static part.
        index: The chunk within the tile; each plane's field is that modulo its fields.
    """
    code, low = None, 0
    for plane, width in zip(planes, problem.widths, strict=True):
        shift = shift_of(width, index)
        shifted = plane if shift == 0 else lax.shift_right_logical(plane, np.int32(shift))
        part = shifted & np.int32(2**width - 1)
        part = part << np.int32(low) if low else part
        code = part if code is None else code | part
        low += width
    assert code is not None
    return code


def _select(code: jax.Array, values: list[Any], bits: int) -> jax.Array:
    """`values[code]` by a binary tree of selects."""
    level = values
    for bit in range(bits):
        chosen = (code & np.int32(1 << bit)) != 0
        level = [
            jnp.where(chosen, high, low) for low, high in zip(level[::2], level[1::2], strict=True)
        ]
    return level[0]


def float_weights(
    code: jax.Array, zero: jax.Array | None, problem: Problem, dtype: Any
) -> list[jax.Array]:
    """Weights in `dtype`, as arrays that sum to level - zero_point, without the step of the levels.

    Args:
        code: int32 [64, C].
        zero: Zero points broadcast to [64, C], float32, or None.
        problem: The static part.
        dtype: bfloat16 or float8_e4m3fn; it holds the weights exactly, or, of tables, bfloat16's
            parts do.
    """
    if isinstance(problem.levels, Affine):
        offset = -problem.levels.low / problem.levels.step
        whole = float(np.floor(offset))
        value = lax.bitcast_convert_type(code | np.int32(_MAGIC_BITS), jnp.float32)
        value = value - np.float32(_MAGIC + whole)
        value = value - np.float32(offset - whole) if offset != whole else value
        return [(value if zero is None else value - zero).astype(dtype)]
    rest = _select(code, [np.float32(v) for v in problem.levels.values], problem.bits)
    parts = []
    for _ in range((bfloat16_parts(problem) or 1) - 1 if dtype == jnp.bfloat16 else 0):
        high = truncated(rest)
        parts.append(high.astype(dtype))
        rest = rest - high
    return [*parts, rest.astype(dtype)]


def integer_weights(code: jax.Array, zero: jax.Array | None, problem: Problem) -> jax.Array:
    """Weights as int8 [64, C]: `integer_multiplier` times level - zero_point; `zero` is int32."""
    multiplier = integer_multiplier(problem)
    assert multiplier is not None
    if isinstance(problem.levels, Table):
        values = [np.int32(round(v * multiplier)) for v in problem.levels.values]
        return _select(code, values, problem.bits).astype(jnp.int8)
    step, low = round(problem.levels.step * multiplier), round(problem.levels.low * multiplier)
    value = code if step == 1 else code * np.int32(step)
    value = value + np.int32(low) if low else value
    if zero is not None:
        value = value - (zero if multiplier == 1 else zero * np.int32(multiplier))
    return value.astype(jnp.int8)
