"""Decode attention over packed keys and values on TPU; see `kernels_pallas.attention`.

A block is some positions with the words of all key heads side by side in the lanes: one head's 16
or 32 words alone would leave most of the lanes, and of the MXU's depth, idle. Queries are laid out
block by block along a diagonal, each zero outside its own key head; the products then take all
heads at once, and of the sums of values the diagonal blocks are kept. Blocks outside of what is
seen are neither read nor computed.
"""

import functools
from typing import Any, Final

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from kernels_pallas.attention import LOWEST, Attention, by_field, capped, levels, merge
from kernels_pallas.config import round_up

POSITIONS: Final = 256  # of one block
_ROWS: Final = 16


def why_not(attention: Attention, capacity: int) -> str | None:
    """Why there is no kernel for such a cache; None: there is one."""
    del capacity
    if attention.words * attention.kv_heads > 1024:
        return f"{attention.kv_heads} key heads of {attention.words} words; 1024 words fit a block"
    return None


def _kernel(*refs: Any, attention: Attention, steps: int, dtype: Any) -> None:
    """bounds; q [F, R, HW], words [P, HW], scales [H, P], owners [R, H] -> sums, m, l; scratch."""
    bounds, query, keys, values, key_scale, value_scale, owners = refs[:7]
    sums_out, largest_out, total_out, sums, largest, total = refs[7:]
    step = pl.program_id(2)
    at = (pl.program_id(1) * steps + step) * POSITIONS
    exact = lax.Precision.HIGHEST
    precision = exact if dtype == jnp.float32 else None

    @pl.when(step == 0)
    def _() -> None:
        sums[...] = jnp.zeros_like(sums)
        largest[...] = jnp.full_like(largest, np.float32(LOWEST))
        total[...] = jnp.zeros_like(total)

    @pl.when((at < bounds[1]) & (at + POSITIONS > bounds[0]))
    def _() -> None:
        def spread(scale: Any) -> jax.Array:  # a row for every query head
            return jnp.dot(owners[...], scale[0], precision=exact)

        scores = None
        for field in range(attention.fields):
            piece = levels(keys[0], field, attention.fmt).astype(dtype)
            part = lax.dot_general(
                query[0, field], piece, (((1,), (1,)), ((), ())),
                precision=precision, preferred_element_type=jnp.float32,
            )  # fmt: skip
            scores = part if scores is None else scores + part
        assert scores is not None
        scores = capped(scores * spread(key_scale), attention)
        position = at + lax.broadcasted_iota(jnp.int32, scores.shape, 1)
        seen = (position >= bounds[0]) & (position < bounds[1])
        scores = jnp.where(seen, scores, np.float32(LOWEST))
        now = jnp.maximum(largest[...], jnp.max(scores, axis=1, keepdims=True))
        weights = jnp.where(seen, jnp.exp(scores - now), np.float32(0))
        fade = jnp.exp(largest[...] - now)
        total[...] = total[...] * fade + jnp.sum(weights, axis=1, keepdims=True)
        largest[...] = now
        weights = jnp.where(seen, weights * spread(value_scale), np.float32(0)).astype(dtype)
        for field in range(attention.fields):
            piece = levels(values[0], field, attention.fmt).astype(dtype)
            fresh = jnp.dot(weights, piece, precision=precision, preferred_element_type=jnp.float32)
            sums[field] = sums[field] * fade + fresh

    @pl.when(step == steps - 1)
    def _() -> None:
        sums_out[0, 0] = sums[...]
        largest_out[0, 0] = largest[...]
        total_out[0, 0] = total[...]


def attend(
    query: jax.Array,
    keys: tuple[jax.Array, jax.Array],
    values: tuple[jax.Array, jax.Array],
    bounds: jax.Array,
    attention: Attention,
    *,
    splits: int | None,
    interpret: bool,
) -> jax.Array:
    """See `kernels_pallas.api.attend`; bounds: int32 [2]."""
    batch, capacity = keys[0].shape[:2]
    blocks = -(-capacity // POSITIONS)
    splits = min(splits or 1, blocks)
    steps = -(-blocks // splits)
    heads, fields, group = attention.kv_heads, attention.fields, attention.group
    dtype = jnp.bfloat16 if query.dtype == jnp.bfloat16 else jnp.float32
    rows, width = round_up(attention.heads, _ROWS), heads * attention.words
    owner = np.zeros((rows, heads), np.float32)
    owner[np.arange(attention.heads), np.arange(attention.heads) // group] = 1
    asked = by_field(query.astype(dtype), attention)  # [B, H, F, group, W]
    own = jnp.eye(heads, dtype=dtype)[:, None, :, None]
    asked = jnp.moveaxis(asked, 2, 1)[:, :, :, :, None, :] * own[None, None]
    asked = asked.reshape(batch, fields, attention.heads, width)
    asked = jnp.pad(asked, [(0, 0), (0, 0), (0, rows - attention.heads), (0, 0)])
    packed = [array.reshape(batch, capacity, width) for array in (keys[0], values[0])]
    scales = [jnp.swapaxes(array, 1, 2).astype(jnp.float32) for array in (keys[1], values[1])]

    def block(part: Any, step: Any, limits: Any) -> Any:
        # Blocks that are not computed are the same as their neighbours, which are not read again.
        first = lax.div(limits[0], np.int32(POSITIONS))
        last = lax.div(jnp.maximum(limits[1] - 1, 0), np.int32(POSITIONS))
        return jnp.clip(part * steps + step, first, jnp.minimum(last, blocks - 1))

    words_spec = pl.BlockSpec((1, POSITIONS, width), lambda b, p, s, n: (b, block(p, s, n), 0))
    scale_spec = pl.BlockSpec((1, heads, POSITIONS), lambda b, p, s, n: (b, 0, block(p, s, n)))
    column = (rows, 1)
    sums, largest, total = pl.pallas_call(
        functools.partial(_kernel, attention=attention, steps=steps, dtype=dtype),
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=1,
            grid=(batch, splits, steps),
            in_specs=[
                pl.BlockSpec((1, fields, rows, width), lambda b, p, s, n: (b, 0, 0, 0)),
                words_spec, words_spec, scale_spec, scale_spec,
                pl.BlockSpec((rows, heads), lambda b, p, s, n: (0, 0)),
            ],
            out_specs=[
                pl.BlockSpec((1, 1, fields, rows, width), lambda b, p, s, n: (b, p, 0, 0, 0)),
                pl.BlockSpec((1, 1, *column), lambda b, p, s, n: (b, p, 0, 0)),
                pl.BlockSpec((1, 1, *column), lambda b, p, s, n: (b, p, 0, 0)),
            ],
            scratch_shapes=[
                pltpu.VMEM((fields, rows, width), jnp.float32),
                pltpu.VMEM(column, jnp.float32),
                pltpu.VMEM(column, jnp.float32),
            ],
        ),
        out_shape=[
            jax.ShapeDtypeStruct((batch, splits, fields, rows, width), jnp.float32),
            jax.ShapeDtypeStruct((batch, splits, *column), jnp.float32),
            jax.ShapeDtypeStruct((batch, splits, *column), jnp.float32),
        ],
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("parallel", "parallel", "arbitrary")
        ),
        interpret=pltpu.InterpretParams(out_of_bounds_reads="uninitialized")
        if interpret
        else False,
        name=f"attend_{attention.fmt}",
    )(bounds, asked, *packed, *scales, jnp.asarray(owner))  # fmt: skip
    sums = sums[:, :, :, : attention.heads]
    sums = sums.reshape(batch, splits, fields, heads, group, heads, attention.words)
    at = np.arange(heads)
    sums = sums[:, :, :, at, :, at]  # [H, B, splits, F, group, W]: the blocks of the diagonal
    sums = jnp.transpose(sums, (1, 2, 0, 4, 5, 3)).reshape(batch, splits, attention.heads, -1)
    state = [array[:, :, : attention.heads, 0] for array in (largest, total)]
    y = merge(sums[..., : attention.head_dim], *state)
    return y.astype(query.dtype)
