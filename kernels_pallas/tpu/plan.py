"""What the TPU kernel can compute, and with which tiles."""

from typing import Final

import jax.numpy as jnp
import numpy as np

from kernels_pallas.config import TpuConfig, k_group, k_unit, largest_divisor, look_up, round_up
from kernels_pallas.problem import (
    Affine,
    Problem,
    bfloat16_parts,
    integer_multiplier,
    representable,
    weight_values,
)

LANES: Final = 128
WORD_TILE: Final = 8 * 32  # bits of a column in the smallest tile of int32 rows
K_BASE: Final = WORD_TILE  # elements that fill such a tile in the 1-bit plane


def why_not(problem: Problem) -> str | None:
    """Why this kernel does not compute the problem, or None if it does."""
    if problem.groups > 1 and LANES % problem.group and problem.group % LANES:
        return (
            f"groups of {problem.group} neither divide {LANES} nor are a multiple of it; the MXU "
            f"contracts {LANES} at a time"
        )
    if problem.groups > 1 and problem.group < 16:
        return f"groups of {problem.group} are below the 16 rows of a bfloat16 tile"
    if isinstance(problem.levels, Affine) and np.frexp(problem.levels.step)[0] != 0.5:
        return f"a step of {problem.levels.step} is not a power of two, so levels are not exact"
    if not isinstance(problem.levels, Affine) and problem.bits > 4:
        return f"tables of {2**problem.bits} entries; 16 is the most"
    if not isinstance(problem.levels, Affine) and problem.zero_points:
        return "tables have no zero points"
    if problem.act == "int8" and integer_multiplier(problem) is None:
        return "its levels are not integers, also not times 2, 4 or 8, as int8 products need"
    if problem.act == "fp8" and not representable(weight_values(problem), jnp.float8_e4m3fn):
        return "its levels are not exact in float8_e4m3fn"
    if problem.act is None and bfloat16_parts(problem) is None:
        return "its levels are not a sum of three bfloat16 numbers"
    return None


def heuristic(problem: Problem, m: int) -> TpuConfig:
    """Tiles for a shape that no table has: long along K for decoding, tall for prefill."""
    unit = k_unit(problem, K_BASE)
    padded_k = round_up(problem.k, unit)
    bm = min(round_up(m, 32), 256)
    limit = 2048 if bm <= 64 else 1024
    if problem.groups > 1 and problem.group > limit:
        bk = largest_divisor(problem.group, unit, limit)
    else:
        bk = largest_divisor(padded_k, max(unit, k_group(problem, unit)), limit)
    bn = problem.n if problem.n <= 512 else 512
    return TpuConfig(bm=bm, bk=bk, bn=bn)


def choose(problem: Problem, m: int, device: str) -> TpuConfig:
    """The tuned tiles of this device and shape, else the heuristic's."""
    entry = look_up(device, problem, m)
    return heuristic(problem, m) if entry is None else TpuConfig(**entry)
