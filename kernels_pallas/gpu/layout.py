"""The order in which the Hopper kernel reads words, and the tiles that follow from it.

Canonical words hold consecutive codes of a column, so that one shift of a word gives codes that are
one word apart. The tensor core wants runs along K, in shared memory, of whole swizzle lines. So the
fields of a word are made a *chunk* apart: with F = 32 / width fields a word and chunks of C
elements,

    word[t, r, n, j], field f   holds   code[k = t * T + (r * F + f) * C + j, n]

and one shift and mask of a block [64, C] of words is a block [64, C] of weights, ready to be
stored. A *tile* is what one step of the pipeline brings: T elements along K, the fewest that fill a
word of every plane (32 C / narrowest width), for 128 outputs. Codes of several planes share j and
n.

Fields 4 g to 4 g + 3 lie in the four bytes of a word, the first two of them 16 bits apart and the
last two as well (`shift_of`): one shift and mask also gives two or four neighbouring chunks at once
(`joined.py`).
"""

import dataclasses
from typing import Any, Final

import jax
import jax.numpy as jnp
from jax.experimental.pallas import mosaic_gpu as plgpu

from kernels_pallas.config import round_up
from kernels_pallas.problem import WORD, Affine, Problem
from kernels_pallas.reference import codes

BYTES: Final = (0, 2, 1, 3)  # of a word, in which four neighbouring fields lie; its own inverse
ROWS: Final = 64  # outputs of one warpgroup: the M of wgmma
BLOCK: Final = 2 * ROWS  # outputs of one block of two warpgroups


def line(elements: int, bits: int) -> tuple[plgpu.TilingTransform, plgpu.SwizzleTransform]:
    """The layout in shared memory of rows of `elements` of `bits`, free of bank conflicts."""
    swizzle = plgpu.find_swizzle(elements * bits)
    # Both are concrete; mypy takes an empty body of their base for an abstract method.
    tiling = plgpu.TilingTransform((8, swizzle * 8 // bits))  # type: ignore[abstract]
    return tiling, plgpu.SwizzleTransform(swizzle)  # type: ignore[abstract]


def tile(problem: Problem, chunk: int) -> int:
    """Elements along K in one tile."""
    return chunk * WORD // min(problem.widths)


def recoding(problem: Problem) -> int:
    """What is added to codes in this order, so that the middle one of all stands for 0.

    Weights of such codes take the fewest instructions (`joined.py`). Ternary, 3 of 4 codes from -1
    on, gets the last three: 1.
    """
    levels = problem.levels
    if not isinstance(levels, Affine) or levels.step != 1 or problem.zero_points:
        return 0
    added = levels.low + 2 ** (problem.bits - 1)
    fits = added == round(added) and 0 < added <= 2**problem.bits - problem.codes
    return int(added) if fits and len(problem.widths) == 1 else 0


def recoded(problem: Problem) -> Problem:
    """The same product of codes with `recoding` added."""
    if not (added := recoding(problem)):
        return problem
    assert isinstance(problem.levels, Affine)
    return dataclasses.replace(problem, levels=Affine(problem.levels.low - added))


def shift_of(width: int, index: int) -> int:
    """The lowest bit, in its word, of chunk `index` of a tile."""
    four, one = divmod(index % (WORD // width), 4)
    return 8 * BYTES[one] + width * four


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Chunked:
    """Planes int32 [tiles, rows, N padded to 128, chunk]; see the head of this module."""

    planes: tuple[jax.Array, ...]

    @property
    def chunk(self) -> int:
        """Elements along K in one field of a block of words."""
        return self.planes[0].shape[-1]


def chunked(words: tuple[Any, ...], problem: Problem, chunk: int) -> Chunked:
    """Canonical planes to the order above, codes recoded; K padded to tiles and N to blocks, with
    code 0.
    """
    length = tile(problem, chunk)
    padded_k, padded_n = round_up(problem.k, length), round_up(problem.n, BLOCK)
    # The rows that pad K to whole canonical words keep their codes, so that `canonical` returns
    # them.
    all_codes = codes(
        words, dataclasses.replace(problem, k=problem.padded_k, group=problem.padded_k)
    )
    pads = [(0, padded_k - problem.padded_k), (0, padded_n - problem.n)]
    all_codes = all_codes.astype(jnp.uint32) + jnp.uint32(recoding(problem))
    all_codes = jnp.pad(all_codes & jnp.uint32(2**problem.bits - 1), pads)
    planes, low = [], 0
    for width in problem.widths:
        per_word = WORD // width
        part = (all_codes >> jnp.uint32(low)) & jnp.uint32(2**width - 1)
        part = part.reshape(padded_k // length, -1, per_word, chunk, padded_n)
        packed = jnp.sum(part << _shifts(width), axis=2, dtype=jnp.uint32)
        planes.append(jax.lax.bitcast_convert_type(packed.swapaxes(2, 3), jnp.int32))
        low += width
    return Chunked(tuple(planes))


def canonical(words: Chunked, problem: Problem) -> tuple[jax.Array, ...]:
    """The inverse of `chunked`."""
    planes = []
    for plane, width in zip(words.planes, problem.widths, strict=True):
        per_word = WORD // width
        fields = jax.lax.bitcast_convert_type(plane.swapaxes(2, 3), jnp.uint32)[:, :, None]
        part = (fields >> _shifts(width)) & jnp.uint32(2**width - 1)
        part = (part - jnp.uint32(recoding(problem))) & jnp.uint32(2**width - 1)
        part = part.reshape(-1, plane.shape[2])[: problem.padded_k, : problem.n]
        shifts = jnp.arange(per_word, dtype=jnp.uint32)[None, :, None] * jnp.uint32(width)
        part = part.reshape(-1, per_word, problem.n) << shifts
        part = jnp.sum(part, axis=1, dtype=jnp.uint32)
        planes.append(jax.lax.bitcast_convert_type(part, jnp.int32))
    return tuple(planes)


def _shifts(width: int) -> jax.Array:
    """Of the fields of a word, [1, 1, F, 1, 1]."""
    shifts = [shift_of(width, index) for index in range(WORD // width)]
    return jnp.asarray(shifts, jnp.uint32)[None, None, :, None, None]
