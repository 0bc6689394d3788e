"""Packed matrix product on TPU (Mosaic TPU): 16-bit, int8 and fp8 activations, 1- to 8-bit weights.

The grid runs over (M, N, K), K innermost. A step reads packed words of a [bk, bn] tile, makes
weights of them in registers (see `decode.py`), multiplies one segment along K after the other on
the MXU, scales each float32 product by the scale of its group ("post-scale": the weights that enter
the MXU are the exact levels) and adds it to an accumulator in VMEM.

- A segment is a group, or the whole tile where a column has one scale.
- Groups shorter than the MXU's 128 would leave most of it idle. There, 128 rows of weights are
  loaded once, and x enters as a stack of copies, each zero outside one group: the copies are extra
  rows of x, of which decoding has few anyway.
- int8: products and sums are exact in int32, with the offset (level - field, zero points) as an
  integer times the row sum of the segment; the group's scale then multiplies one float32.

What is left out: quantizing the activations inside the kernel (XLA does it, once instead of once
for each column of tiles), and scaling the weights instead of the products, which would pay from
some hundred rows on and round the weights a second time.
"""

import dataclasses
import functools
from typing import Any, Final

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from kernels_pallas.config import TpuConfig, k_unit, round_up
from kernels_pallas.problem import E2M1, Affine, Problem
from kernels_pallas.tpu.decode import (
    centre,
    centred,
    centred_when_prepared,
    float_weights,
    integer_weights,
    integers,
    uncentred,
)
from kernels_pallas.tpu.plan import K_BASE, LANES, WORD_TILE, choose, why_not

__all__ = ["Prepared", "choose", "prepare", "product", "restore", "why_not"]

_LONGEST: Final = 512  # elements along K that are multiplied at once where a column has one scale
_COMPUTE: Final = {None: jnp.bfloat16, "int8": jnp.int8, "fp8": jnp.float8_e4m3fn}


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Prepared:
    """Planes padded to whole tiles, their fields signed where that costs no bits."""

    planes: tuple[jax.Array, ...]


def prepare(words: tuple[jax.Array, ...], problem: Problem) -> Prepared:
    """Pads K to whole tiles, and makes codes of 2, 4 and 8 bits signed integers."""
    planes = _padded(words, problem)
    if centred_when_prepared(problem):
        planes = tuple(centred(plane, problem) for plane in planes)
    return Prepared(planes)


def restore(words: Prepared, problem: Problem) -> tuple[jax.Array, ...]:
    """The canonical planes of prepared words."""
    planes = words.planes
    if centred_when_prepared(problem):
        planes = tuple(uncentred(plane, problem) for plane in planes)
    return tuple(
        plane[: problem.plane_shape(width)[0]]
        for plane, width in zip(planes, problem.widths, strict=True)
    )


def _padded(words: tuple[jax.Array, ...], problem: Problem) -> tuple[jax.Array, ...]:
    """The planes with rows added behind K; the same arrays where none is missing."""
    padded_k = round_up(problem.k, k_unit(problem, K_BASE))
    return tuple(
        jnp.pad(plane, [(0, padded_k * width // 32 - plane.shape[0]), (0, 0)])
        for plane, width in zip(words, problem.widths, strict=True)
    )


def _segment_product(
    x: jax.Array, parts: list[jax.Array], offset: jax.Array | None, integer: Any, group: int
) -> jax.Array:
    """The products of one segment with all its groups: [J, M, N], J groups of `group` elements.

    Args:
        x: [M, segment], in the compute dtype.
        parts: Weights [segment, N], as a sum; narrow integers, or in the dtype of x.
        offset: What is added to every weight of a group, [J, 1, N]: float for float weights; for
            integers the b of (a * product + b * sum(x)), int32. None: nothing.
        integer: `Integers` of int8 weights, or None.
        group: Elements of a group; the segment, or a divisor of it.
    """
    m, length = x.shape
    count = length // group
    if count > 1:  # one copy of x for each group, zero elsewhere
        owner = lax.broadcasted_iota(jnp.int32, x.shape, 1) // np.int32(group)
        wide = x.astype(jnp.float32)  # TPUs select 32-bit lanes everywhere
        copies = [jnp.where(owner == j, wide, jnp.zeros_like(wide)) for j in range(count)]
        x = jnp.concatenate(copies, axis=0).astype(x.dtype)
    if integer is not None:
        product = jnp.dot(x, parts[0], preferred_element_type=jnp.int32)
        product = product.reshape(count, m, -1) * np.int32(integer.a)
        if offset is None:
            return product.astype(jnp.float32)
        row_sum = jnp.sum(x.astype(jnp.int32), axis=1, keepdims=True).reshape(count, m, 1)
        return (product + row_sum * offset).astype(jnp.float32)
    total = None
    for part in parts:
        if offset is not None:
            wide = part.astype(jnp.float32).reshape(count, group, -1) + offset
            part = wide.reshape(length, -1).astype(x.dtype)
        product = _dot(x, part, jnp.float32)
        total = product if total is None else total + product
    assert total is not None
    return total.reshape(count, m, -1)


def _dot(x: jax.Array, weights: jax.Array, dtype: Any) -> jax.Array:
    """x [M, K] @ weights [K, N], whose dtypes may differ."""
    return lax.dot_general(x, weights, (((1,), (0,)), ((), ())), preferred_element_type=dtype)


def _constants(problem: Problem) -> tuple[float, int, float]:
    """What the decoded weights leave out: (weight + constant - unit * zero_point) * step."""
    if problem.act == "int8":
        integer = integers(problem)
        return float(integer.b), integer.multiplier, 1 / integer.multiplier
    if isinstance(problem.levels, Affine):
        return centre(problem).offset, 1, centre(problem).step
    return 0.0, 1, 0.5 if problem.levels.values == E2M1 else 1.0


def _kernel(*refs: Any, problem: Problem, config: TpuConfig, dtype: Any, is_centred: bool) -> None:
    """x [bm, bk], planes [bk * width / 32, bn], scale, zero points [G, 1, bn] -> y [bm, bn]."""
    planes_end = 1 + len(problem.widths)
    x_ref, plane_refs, scale_ref = refs[0], refs[1:planes_end], refs[planes_end]
    zero_ref = refs[planes_end + 1] if problem.zero_points else None
    out_ref, acc_ref = refs[-2:]

    @pl.when(pl.program_id(2) == 0)
    def _() -> None:
        acc_ref[...] = jnp.zeros_like(acc_ref)

    integer = integers(problem) if problem.act == "int8" else None
    constant, unit, step = _constants(problem)
    offset_dtype = jnp.float32 if integer is None else jnp.int32
    group = problem.group if problem.groups > 1 else config.bk
    segment = min(max(group, LANES), config.bk, _LONGEST)
    # Whole tiles of eight words of each plane are decoded at a time, and few enough to stay in
    # registers until they are multiplied.
    piece = max(segment, WORD_TILE // min(problem.widths))
    total = None
    for start in range(0, config.bk, segment):
        if start % piece == 0:
            planes = [
                ref[start * width // 32 : (start + piece) * width // 32]
                for ref, width in zip(plane_refs, problem.widths, strict=True)
            ]
            if integer is None:
                weights = float_weights(planes, problem, dtype, is_centred)
            else:
                weights = [integer_weights(planes, problem, is_centred)]
        rows = slice(start % piece, start % piece + segment)
        count = max(segment // group, 1)
        at = slice(start // group, start // group + count)
        offset = None
        if zero_ref is not None:
            zero = zero_ref[at].astype(jnp.int32).astype(offset_dtype)
            offset = offset_dtype(constant) - zero * offset_dtype(unit)
        elif constant:
            offset = jnp.full((count, 1, config.bn), constant, offset_dtype)
        products = _segment_product(
            x_ref[:, start : start + segment],
            [part[rows] for part in weights],
            offset, integer, min(group, segment),
        )  # fmt: skip
        scale = scale_ref[at].astype(jnp.float32) * np.float32(step)
        scaled = jnp.sum(products * scale, axis=0)
        total = scaled if total is None else total + scaled
    acc_ref[...] += total

    @pl.when(pl.program_id(2) == pl.num_programs(2) - 1)
    def _() -> None:
        out_ref[...] = acc_ref[...].astype(out_ref.dtype)


def product(
    x: jax.Array,
    words: tuple[jax.Array, ...] | Prepared,
    scale: jax.Array,
    zero_point: jax.Array | None,
    *,
    problem: Problem,
    config: TpuConfig,
    out_dtype: Any,
    interpret: bool,
) -> jax.Array:
    """x @ weights for x that the MXU takes: bfloat16, int8 or float8_e4m3fn [M, K], to [M, N].

    Args:
        x: Activations, already rounded or split.
        words: Canonical or prepared planes.
        scale: [G or 1, N or 1], float32 or bfloat16.
        zero_point: The same shape, uint8, or None.
        problem: The static part.
        config: Tiles.
        out_dtype: Of the result.
        interpret: Whether the TPU interpreter runs the kernel, on any machine.
    """
    m, n = x.shape[0], problem.n
    is_centred = isinstance(words, Prepared) and centred_when_prepared(problem)
    planes = words.planes if isinstance(words, Prepared) else _padded(words, problem)
    padded_k = planes[0].shape[0] * 32 // problem.widths[0]
    padded_m = round_up(m, config.bm)
    x = jnp.pad(x, [(0, padded_m - m), (0, padded_k - problem.k)])
    # Padded groups meet zeros of x; their scale is zero, so that no NaN of it can enter.
    grid_groups = padded_k // problem.group if problem.groups > 1 else 1
    per_group = [_per_group(scale, grid_groups, n)]
    if zero_point is not None:
        per_group.append(_per_group(zero_point, grid_groups, n))

    bm, bk, bn = config.bm, config.bk, config.bn
    block_groups = max(bk // problem.group, 1) if problem.groups > 1 else 1
    longest = problem.group if problem.groups > 1 else padded_k
    group_spec = pl.BlockSpec(
        (block_groups, 1, bn),
        lambda i, j, k: (k if longest < bk else lax.div(k * bk, longest), 0, j),
    )
    return pl.pallas_call(
        functools.partial(
            _kernel,
            problem=problem,
            config=config,
            dtype=_COMPUTE[problem.act],
            is_centred=is_centred,
        ),
        grid=(padded_m // bm, pl.cdiv(n, bn), padded_k // bk),
        in_specs=[
            pl.BlockSpec((bm, bk), lambda i, j, k: (i, k)),
            *(pl.BlockSpec((bk * w // 32, bn), lambda i, j, k: (k, j)) for w in problem.widths),
            *([group_spec] * len(per_group)),
        ],
        out_specs=pl.BlockSpec((bm, bn), lambda i, j, k: (i, j)),
        out_shape=jax.ShapeDtypeStruct((padded_m, n), out_dtype),
        scratch_shapes=[pltpu.VMEM((bm, bn), jnp.float32)],
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("parallel", "parallel", "arbitrary")
        ),
        interpret=pltpu.InterpretParams(out_of_bounds_reads="uninitialized")
        if interpret
        else False,
        name=f"packed_matmul_w{problem.bits}_{problem.act or 'a16'}",
    )(x, *planes, *per_group)[:m]


def _per_group(array: jax.Array, groups: int, n: int) -> jax.Array:
    """[G or 1, N or 1] to [groups, 1, N], zeros behind: a row is then a block of its own."""
    full = jnp.broadcast_to(array, (array.shape[0], n))
    if full.shape[0] == 1 and groups > 1:
        full = jnp.broadcast_to(full, (groups, n))
    return jnp.pad(full, [(0, groups - full.shape[0]), (0, 0)])[:, None, :]
