"""Decode attention over packed keys and values on Hopper; see `kernels_pallas.attention`.

One block of one warpgroup takes one key head of one sequence and one part of the positions, 64 at a
time. The query heads that ask this key head are the tensor core's 64 rows, padded with zeros: the
arithmetic that is wasted is none of what a decoded token waits for. A step turns the words of 64
positions into bfloat16 in shared memory, multiplies, takes the softmax a step further and
multiplies again, while the words of the next steps are under way. Only positions between `start`
and `stop` are read, whatever the capacity is.
"""

import functools
from typing import Any, Final

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from kernels_pallas.activations import PARTS
from kernels_pallas.attention import LOWEST, Attention, by_field, capped, levels, merge, split
from kernels_pallas.config import round_up
from kernels_pallas.gpu.layout import line

POSITIONS: Final = 64  # of one step
ROWS: Final = 64  # query heads of one key head, padded
_STAGES: Final = 4
_LAYOUT: Final = plgpu.Layout.WGMMA


def why_not(attention: Attention, capacity: int) -> str | None:
    """Why there is no kernel for such a cache; None: there is one."""
    if attention.group > ROWS:
        return f"{attention.group} query heads to a key head; {ROWS} fit"
    if capacity % POSITIONS:
        return f"a capacity of {capacity} positions is no multiple of {POSITIONS}"
    if attention.words not in (16, 32, 64):
        return (
            f"{attention.head_dim} features of a head take {attention.words} words; 16, 32 and 64 "
            "are whole lines of shared memory"
        )
    return None


def splits_for(attention: Attention, batch: int, capacity: int, cores: int = 132) -> int:
    """Parts of the positions: enough blocks for every core, and four steps or more in each."""
    blocks, steps = batch * attention.kv_heads, capacity // POSITIONS
    return max(1, min(-(-cores // blocks), steps // 4))


def _kernel(*refs: Any, attention: Attention, steps: int, splits: int) -> None:
    """bounds [2], q, words of keys and values, their scales -> sums, [m, l], for one part."""
    bounds, query, *sources, sums_out, state_out = refs[:8]
    query_shared, *shared = refs[8:13]
    keys_shared, values_shared, weights_shared, sums_shared, state_shared = refs[13:18]
    ready, query_ready = refs[18:]
    batch, head, part = (lax.axis_index(name) for name in ("batch", "head", "split"))
    stages, count, words = shared[0].shape[0], query_shared.shape[0], attention.words
    start, stop = bounds[0], bounds[1]
    per = -(-steps // splits)
    first = jnp.maximum(part * per, lax.div(start, np.int32(POSITIONS)))
    last = jnp.minimum((part + 1) * per, lax.div(stop + (POSITIONS - 1), np.int32(POSITIONS)))
    length = jnp.maximum(last - first, 0)

    def fetch(step: Any) -> None:
        slot = lax.rem(step, np.int32(stages))
        rows = pl.ds((first + step) * POSITIONS, POSITIONS)
        columns = pl.ds(head * words, words)
        where = [(batch, rows, columns)] * 2 + [(batch, head, rows)] * 2
        for source, target, at in zip(sources, shared, where, strict=True):
            plgpu.copy_gmem_to_smem(source.at[at], target.at[slot], ready.at[slot])

    plgpu.copy_gmem_to_smem(query.at[batch, head], query_shared, query_ready)
    for ahead in range(stages - 1):

        @pl.when(ahead < length)
        def _(ahead: int = ahead) -> None:
            fetch(np.int32(ahead))

    plgpu.barrier_wait(query_ready)
    square, rows_of = (ROWS, POSITIONS), _LAYOUT.reduce(1)

    def over_columns(row: jax.Array) -> jax.Array:
        return lax.broadcast_in_dim(row, square, [1])

    def over_rows(column: jax.Array, width: int = POSITIONS) -> jax.Array:
        return lax.broadcast_in_dim(column, (ROWS, width), [0])

    def body(step: Any, carry: Any) -> Any:
        largest, total, *sums = carry
        slot = lax.rem(step, np.int32(stages))
        plgpu.barrier_wait(ready.at[slot])
        for ref, target in zip(shared[:2], (keys_shared, values_shared), strict=True):
            packed = plgpu.load(ref.at[slot], layout=_LAYOUT)
            for field in range(attention.fields):
                target[field] = levels(packed, field, attention.fmt).astype(jnp.bfloat16)
        key_scale, value_scale = (
            plgpu.load(ref.at[slot], layout=_LAYOUT.reduce(0)) for ref in shared[2:]
        )
        # For the tensor core, which reads what was written, and for the copies, which overwrite
        # what the step before this one read.
        plgpu.commit_smem()

        @pl.when(step + (stages - 1) < length)
        def _() -> None:
            fetch(step + (stages - 1))

        def products(acc: Any) -> jax.Array:
            for index in range(count):
                for field in range(attention.fields):
                    plgpu.wgmma(acc, query_shared.at[index, field], keys_shared.at[field].T)
            return acc[...]

        scores = pl.run_scoped(products, plgpu.ACC(square, jnp.float32))
        scores = capped(scores * over_columns(key_scale), attention)
        position = plgpu.broadcasted_iota(jnp.int32, square, 1, layout=_LAYOUT)
        position = position + (first + step) * POSITIONS
        seen = (position >= start) & (position < stop)
        scores = jnp.where(seen, scores, np.float32(LOWEST))
        now = jnp.maximum(largest, jnp.max(scores, axis=1))
        weights = jnp.where(seen, jnp.exp(scores - over_rows(now)), np.float32(0))
        fade = jnp.exp(largest - now)
        total = total * fade + jnp.sum(weights, axis=1)
        weights = jnp.where(seen, weights * over_columns(value_scale), np.float32(0))
        for index, piece in enumerate(split(weights, count)):
            weights_shared[index] = piece.astype(jnp.bfloat16)
        plgpu.commit_smem()
        found = []
        for field in range(attention.fields):

            def product(acc: Any, field: int = field) -> jax.Array:
                for index in range(count):
                    plgpu.wgmma(acc, weights_shared.at[index], values_shared.at[field])
                return acc[...]

            fresh = pl.run_scoped(product, plgpu.ACC((ROWS, words), jnp.float32))
            found.append(sums[field] * over_rows(fade, words) + fresh)
        return (now, total, *found)

    def filled(value: float, shape: tuple[int, ...], layout: Any) -> jax.Array:
        return plgpu.layout_cast(jnp.full(shape, value, jnp.float32), layout)

    empty = [filled(0.0, (ROWS, words), _LAYOUT) for _ in range(attention.fields)]
    state = (filled(LOWEST, (ROWS,), rows_of), filled(0.0, (ROWS,), rows_of))
    largest, total, *sums = lax.fori_loop(0, length, body, (*state, *empty))
    for field, array in enumerate(sums):
        sums_shared[field] = array
    state_shared[0], state_shared[1] = largest, total
    plgpu.commit_smem()
    kept = pl.ds(0, sums_out.shape[-2])
    for field in range(attention.fields):  # rows of one field lie side by side, those of all do not
        target = sums_out.at[batch, part, head, field]
        plgpu.copy_smem_to_gmem(sums_shared.at[field, kept], target)
    plgpu.copy_smem_to_gmem(state_shared, state_out.at[batch, part, head])
    plgpu.wait_smem_to_gmem(0)


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
    splits = splits or splits_for(attention, batch, capacity)
    fields, words, count = attention.fields, attention.words, PARTS[query.dtype.name]
    asked = by_field(query.astype(jnp.float32), attention)
    asked = jnp.stack(split(asked, count), axis=2).astype(jnp.bfloat16)
    asked = jnp.pad(asked, [(0, 0)] * 4 + [(0, ROWS - attention.group), (0, 0)])
    packed = [array.reshape(batch, capacity, -1) for array in (keys[0], values[0])]
    scales = [jnp.swapaxes(array, 1, 2).astype(jnp.float32) for array in (keys[1], values[1])]
    stages = min(_STAGES, max(capacity // POSITIONS, 2))
    kept = round_up(attention.group, 8)

    def bfloat16(*shape: int) -> Any:
        # Weights too, though they are longer: both operands of a product have the same lines.
        return plgpu.SMEM(shape, jnp.bfloat16, transforms=line(words, 16))

    heads = (batch, splits, attention.kv_heads)
    sums, state = plgpu.kernel(
        functools.partial(_kernel, attention=attention, steps=capacity // POSITIONS, splits=splits),
        out_type=[
            jax.ShapeDtypeStruct((*heads, fields, kept, words), jnp.float32),
            jax.ShapeDtypeStruct((*heads, 2, ROWS), jnp.float32),
        ],
        scratch_types=[
            bfloat16(count, fields, ROWS, words),
            *[
                plgpu.SMEM((stages, POSITIONS, words), jnp.int32, transforms=line(words, 32))
                for _ in packed
            ],
            *[plgpu.SMEM((stages, POSITIONS), jnp.float32) for _ in scales],
            bfloat16(fields, POSITIONS, words),
            bfloat16(fields, POSITIONS, words),
            bfloat16(count, ROWS, POSITIONS),
            plgpu.SMEM((fields, ROWS, words), jnp.float32),
            plgpu.SMEM((2, ROWS), jnp.float32),
            plgpu.Barrier(num_barriers=stages, num_arrivals=4),
            plgpu.Barrier(num_arrivals=1),
        ],
        grid=(attention.kv_heads, splits, batch),
        grid_names=("head", "split", "batch"),
        compiler_params=plgpu.CompilerParams(approx_math=False),
        interpret=plgpu.InterpretGPUParams(detect_races=True) if interpret else None,
    )(bounds, asked, *packed, *scales)
    group = attention.group
    sums = jnp.moveaxis(sums[..., :group, :], 3, -1)  # [.., group, W, F]
    sums = sums.reshape(*heads, group, -1)[..., : attention.head_dim]
    y = merge(sums, state[..., 0, :group], state[..., 1, :group])
    return y.reshape(query.shape).astype(query.dtype)
