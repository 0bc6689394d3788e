"""What the Hopper kernel can compute, and with which tiles."""

import dataclasses
from typing import Final

import jax.numpy as jnp
import numpy as np

from kernels_pallas.config import GpuConfig, largest_divisor, look_up, round_up
from kernels_pallas.gpu import joined
from kernels_pallas.gpu.layout import BLOCK, ROWS, tile
from kernels_pallas.problem import (
    Affine,
    Problem,
    bfloat16_parts,
    integer_multiplier,
    representable,
    weight_values,
)

COMPUTE: Final = {None: jnp.bfloat16, "int8": jnp.int8, "fp8": jnp.float8_e4m3fn}
# Lines of 64 bytes of bfloat16 first: with 128, tiles are twice as long along K, and 64 rows of x
# no longer fit twice. The same for every `act`, so that words are prepared once.
_CHUNKS: Final = (32, 16)
_STEPS: Final = {None: 16, "int8": 32, "fp8": 32}  # elements along K of one tensor core instruction
_SHARED: Final = 227 * 1024  # bytes a block may have
_BARRIERS: Final = 1024
_STAGES: Final = 6
_SEGMENT_BYTES: Final = 256  # along K of the weights a warpgroup keeps in shared memory


def why_not(problem: Problem) -> str | None:
    """Why this kernel does not compute the problem, or None if it does."""
    chunk = chunk_of(problem)
    if chunk is None:
        return (
            f"groups of {problem.group} do not fit tiles of {tile(problem, _CHUNKS[0])} or "
            f"{tile(problem, _CHUNKS[-1])} elements along K; powers of two from 16 on do"
        )
    if chunk < _STEPS[problem.act]:
        return f"8-bit tensor core steps span 32 elements along K, groups {problem.group}"
    if isinstance(problem.levels, Affine) and np.frexp(problem.levels.step)[0] != 0.5:
        return f"a step of {problem.levels.step} is not a power of two, so levels are not exact"
    if not isinstance(problem.levels, Affine) and problem.bits > 4:
        return f"tables of {2**problem.bits} entries; 16 is the most"
    if not isinstance(problem.levels, Affine) and problem.zero_points:
        return "tables have no zero points"
    if problem.act == "int8":
        multiplier = integer_multiplier(problem)
        if multiplier is None:
            return "its levels are not integers, also not times 2, 4 or 8, as int8 products need"
        if not representable(weight_values(problem) * multiplier, jnp.int8):
            return "its levels minus zero points leave the range of int8"
    if problem.act == "fp8" and not representable(weight_values(problem), jnp.float8_e4m3fn):
        return "its levels are not exact in float8_e4m3fn"
    if problem.act is None and bfloat16_parts(problem) is None:
        return "its levels are not a sum of three bfloat16 numbers"
    return None


def chunk_of(problem: Problem) -> int | None:
    """The largest chunk whose tiles and groups fit into each other, or None."""
    for chunk in _CHUNKS:
        length = tile(problem, chunk)
        short = problem.group % chunk == 0 and length % problem.group == 0
        if problem.groups == 1 or short or problem.group % length == 0:
            return chunk
    return None


def shared_bytes(problem: Problem, config: GpuConfig) -> int:
    """Shared memory of one block, in bytes."""
    length, itemsize = tile(problem, config.chunk), jnp.dtype(COMPUTE[problem.act]).itemsize
    words = BLOCK * length * problem.bits // 8
    scales = scales_per_tile(problem, length) * BLOCK * 4 * (2 if problem.zero_points else 1)
    piece = piece_of(problem, config.chunk)
    weights = 2 * slots_of(problem, config.chunk) * ROWS * piece * itemsize
    stage = config.bm * length * itemsize + words + scales
    return config.stages * stage + weights + BLOCK * config.bm * 4 + _BARRIERS


def heuristic(problem: Problem, m: int, cores: int = 132) -> GpuConfig:
    """Tiles for a shape that no table has: all rows of x in one block if two stages of them fit, as
    many stages as fit, and enough blocks for every core.
    """
    chunk = chunk_of(problem)
    assert chunk is not None
    config = GpuConfig(bm=min(round_up(m, 8), 128), chunk=chunk, stages=2, split_k=1)
    while config.bm > 8 and shared_bytes(problem, config) > _SHARED:
        config = dataclasses.replace(config, bm=round_up(config.bm // 2, 8))
    while config.stages < _STAGES and shared_bytes(problem, config) <= _SHARED:
        config = dataclasses.replace(config, stages=config.stages + 1)
    if shared_bytes(problem, config) > _SHARED:
        config = dataclasses.replace(config, stages=config.stages - 1)
    tiles = round_up(problem.k, tile(problem, chunk)) // tile(problem, chunk)
    blocks = -(-problem.n // BLOCK) * -(-m // config.bm)
    return dataclasses.replace(config, split_k=largest_divisor(tiles, 1, max(cores // blocks, 1)))


def choose(problem: Problem, m: int, device: str) -> GpuConfig:
    """The tuned tiles of this device and shape, else the heuristic's."""
    entry = look_up(device, problem, m)
    return heuristic(problem, m) if entry is None else GpuConfig(**entry)


def scales_per_tile(problem: Problem, length: int) -> int:
    """Rows of scales that one tile of `length` elements along K brings."""
    return max(length // problem.group, 1) if problem.groups > 1 else 1


def piece_of(problem: Problem, chunk: int) -> int:
    """Elements along K of one array of weights."""
    return joined.count(problem, chunk) * chunk


def slots_of(problem: Problem, chunk: int) -> int:
    """Arrays of weights [64, `piece_of`] that a warpgroup multiplies between two waits."""
    length, itemsize = tile(problem, chunk), jnp.dtype(COMPUTE[problem.act]).itemsize
    piece = piece_of(problem, chunk)
    per_scale = length // piece // scales_per_tile(problem, length)
    return min(max(_SEGMENT_BYTES // (piece * itemsize), 1), per_scale) * parts_of(problem)


def parts_of(problem: Problem) -> int:
    """Arrays of weights that are multiplied for one array of codes."""
    return (bfloat16_parts(problem) or 1) if problem.act is None else 1


def step_of(problem: Problem, chunk: int) -> float:
    """What every weight is still to be multiplied by: a power of two."""
    if problem.act == "int8":
        return 1 / ((integer_multiplier(problem) or 1) * joined.raised(problem, chunk))
    return problem.levels.step if isinstance(problem.levels, Affine) else 1.0
