"""Packed matrix product on Hopper (Mosaic GPU): 16-bit, int8 and fp8 x, 1- to 8-bit weights.

The weights are the tensor core's 64-row side ("swap-AB"): a decode step of one row of x is padded
to 8 columns, not to 64 rows, and no weight is. One block computes [128 outputs, bm rows]; of its
three warpgroups one keeps `stages` tiles of words, scales and x in flight by TMA, and two each turn
64 outputs' words into weights and multiply. Weights are exact levels; the float32 (int32) product
of a group is scaled afterwards, which costs four multiply-adds a thread instead of one for each
weight.

`split_k` blocks share one output tile, each with its run of tiles along K; they write float32
partial results, which one sum in a fixed order joins: the same bits in every run.

For many rows of x (prefill) a block stays: `GpuConfig.blocks` of them take one output tile after
the other, the words of the next one under way while the last is written, and the two warpgroups
multiply in turn ("ping-pong"): one makes weights while the tensor core works for the other.
Products are scaled afterwards there, too: at 128 rows that is an eighth of what the tensor core
takes, and scaled weights would be rounded a second time.

What is left out: clusters; atomic accumulation, which is not deterministic; rounding the
activations inside the kernel (`rounding.py` does it, once for all blocks).
"""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from kernels_pallas.config import GpuConfig, round_up
from kernels_pallas.gpu import joined
from kernels_pallas.gpu.decode import field, float_weights, integer_weights
from kernels_pallas.gpu.layout import BLOCK, ROWS, Chunked, canonical, chunked, line, recoded, tile
from kernels_pallas.gpu.plan import (
    COMPUTE,
    choose,
    chunk_of,
    parts_of,
    piece_of,
    scales_per_tile,
    slots_of,
    step_of,
    why_not,
)
from kernels_pallas.problem import Problem

__all__ = ["choose", "prepare", "product", "restore", "why_not"]


def prepare(words: tuple[jax.Array, ...], problem: Problem) -> Chunked:
    """The planes in the kernel's order; see `layout.py`."""
    chunk = chunk_of(problem)
    assert chunk is not None
    return chunked(words, problem, chunk)


def restore(words: Chunked, problem: Problem) -> tuple[jax.Array, ...]:
    """The canonical planes of prepared words."""
    return canonical(words, problem)


def _kernel(*refs: Any, problem: Problem, config: GpuConfig, tiles: int, interpret: bool) -> None:
    """x [pieces, M, L], planes, scale [G, N] (zero points alike) -> y [splits, N, M], float32."""
    count = 3 if problem.zero_points else 2
    inputs = count + len(problem.widths)
    globals_, out_global = refs[:inputs], refs[inputs]
    shared = refs[inputs + 1 : 2 * inputs + 1]
    weights_shared, out_shared, ready, free, *rest = refs[2 * inputs + 1 :]
    turn = rest[0] if rest else None
    warpgroup = lax.axis_index("warpgroup")
    split: Any = 0
    outputs: Any = 1  # tiles of this block, one after the other
    if config.blocks:
        block, tall = lax.axis_index("block"), out_global.shape[2] // config.bm
        units = tall * (out_global.shape[1] // BLOCK)
        outputs = lax.div(units - 1 - block, np.int32(config.blocks)) + 1
    else:
        split = lax.axis_index("split")

    def place(index: Any) -> tuple[Any, Any]:
        """Where the output tile lies along M and N; neighbours along M share the words."""
        if not config.blocks:
            return lax.axis_index("m") * config.bm, lax.axis_index("n") * BLOCK
        unit = block + index * config.blocks
        return lax.rem(unit, np.int32(tall)) * config.bm, lax.div(unit, np.int32(tall)) * BLOCK

    length = tile(problem, config.chunk)
    pieces = length // piece_of(problem, config.chunk)
    steps = tiles // config.split_k
    stages = min(config.stages, steps)
    scales = shared[1 + len(problem.widths)].shape[1]
    long = problem.group if problem.groups > 1 else tiles * length

    @pl.when(warpgroup == 2)
    def _() -> None:
        plgpu.set_max_registers(40, action="decrease")

        @pl.loop(0, outputs * steps)
        def _(step: Any) -> None:
            slot, index = lax.rem(step, stages), lax.div(step, steps)
            at = split * steps + step - index * steps
            m_at, n_at = place(index)

            @pl.when(step >= stages)
            def _() -> None:
                plgpu.barrier_wait(free.at[slot])

            group_at = at * scales if long <= length else lax.div(at * length, long)
            sources = [globals_[0].at[pl.ds(at * pieces, pieces), pl.ds(m_at, config.bm)]]
            for plane in globals_[1 : 1 + len(problem.widths)]:
                sources.append(plane.at[at, :, pl.ds(n_at, BLOCK)])
            for per_group in globals_[1 + len(problem.widths) :]:
                sources.append(per_group.at[pl.ds(group_at, scales), pl.ds(n_at, BLOCK)])
            for source, target in zip(sources, shared, strict=True):
                plgpu.copy_gmem_to_smem(source, target.at[slot], ready.at[slot])

        # Every phase of a barrier has to be seen by whoever waits on it.
        @pl.loop(outputs * steps - stages, outputs * steps)
        def _(step: Any) -> None:
            plgpu.barrier_wait(free.at[lax.rem(step, stages)])

    @pl.when(warpgroup < 2)
    def _() -> None:
        plgpu.set_max_registers(216, action="increase")
        rows = pl.ds(warpgroup * ROWS, ROWS)
        if turn is not None:
            pl.when(warpgroup == 1)(lambda: plgpu.barrier_arrive(turn.at[0]))

        @pl.loop(0, outputs)
        def _(index: Any) -> None:
            def body(_: Any, carry: tuple[Any, jax.Array]) -> tuple[Any, jax.Array]:
                slot, total = carry
                plgpu.barrier_wait(ready.at[slot])
                tile_refs = [ref.at[slot] for ref in shared]
                mine = weights_shared.at[warpgroup]
                turns = None if turn is None else (turn.at[warpgroup], turn.at[1 - warpgroup])
                total = total + _tile_product(
                    tile_refs, mine, rows, problem, config, turns, interpret
                )
                plgpu.barrier_arrive(free.at[slot])
                # A remainder at every step would take four times the instructions.
                return jnp.where(slot == stages - 1, 0, slot + 1), total

            zeros = jnp.zeros((ROWS, config.bm), jnp.float32)
            zeros = plgpu.layout_cast(zeros, plgpu.Layout.WGMMA)
            start = lax.rem(index * steps, np.int32(stages))
            _, total = lax.fori_loop(0, steps, body, (start, zeros))
            out_shared[warpgroup] = total.astype(out_shared.dtype)
            plgpu.commit_smem()
            m_at, n_at = place(index)
            across = pl.ds(n_at + warpgroup * ROWS, ROWS)
            target = out_global.at[split, across, pl.ds(m_at, config.bm)]
            plgpu.copy_smem_to_gmem(out_shared.at[warpgroup], target)
            plgpu.wait_smem_to_gmem(0)

        if turn is not None:  # the last phase has to be seen as well
            pl.when(warpgroup == 0)(lambda: plgpu.barrier_wait(turn.at[0]))


def _tile_product(
    refs: list[Any],
    weights_ref: Any,
    rows: Any,
    problem: Problem,
    config: GpuConfig,
    turns: tuple[Any, Any] | None,
    interpret: bool,
) -> jax.Array:
    """The scaled product of one tile and one warpgroup, float32 [64, bm].

    turns: Barriers of this warpgroup's turn to multiply and of the other's; None: whenever it can.
    """
    widths, chunk = problem.widths, config.chunk
    x_ref, plane_refs, scale_ref = refs[0], refs[1 : 1 + len(widths)], refs[1 + len(widths)]
    zero_ref = refs[2 + len(widths)] if problem.zero_points else None
    together, parts_count = joined.count(problem, chunk), parts_of(problem)
    slots = weights_ref.shape[0] // parts_count
    pieces = x_ref.shape[0]
    per_scale = pieces // scale_ref.shape[0]
    shape = (ROWS, config.bm)
    blocks: dict[tuple[int, int], jax.Array] = {}
    total = None
    stride = min(slots, per_scale)
    # The interpreter knows no tensor core that reads registers.
    by_registers = config.decode == "registers" and not interpret
    for first in range(0, pieces, stride):
        group = first // per_scale
        ready: list[Any] = []
        scale = plgpu.load(scale_ref.at[group, rows], layout=plgpu.Layout.WGMMA.reduce(1))
        zero = None
        if zero_ref is not None:
            zero = plgpu.load(zero_ref.at[group, rows], layout=plgpu.Layout.WGMMA.reduce(1))
        for at in range(first, first + stride):
            words = []
            for plane, (ref, width) in enumerate(zip(plane_refs, widths, strict=True)):
                row = at * together // (32 // width)
                if (plane, row) not in blocks:
                    block = plgpu.load(ref.at[row, rows], layout=plgpu.Layout.WGMMA)
                    blocks[plane, row] = block
                words.append(blocks[plane, row])
            parts = _weights(words, zero, problem, at * together, together, interpret)
            if by_registers:
                ready.extend(parts)
                continue
            for index, part in enumerate(parts):
                weights_ref[(at - first) * parts_count + index] = part
        # For the tensor core, which reads the weights, and for TMA, which overwrites what was
        # loaded: every load of this tile has to stand before the last of these fences.
        plgpu.commit_smem()

        def segment(acc: Any, first: int = first, ready: list[Any] = ready) -> jax.Array:
            for at in range(first, first + stride):
                for index in range((at - first) * parts_count, (at - first + 1) * parts_count):
                    weights = ready[index] if by_registers else weights_ref.at[index]
                    plgpu.wgmma(acc, weights, x_ref.at[at].T)
            return acc[...]

        if turns is not None:
            plgpu.barrier_wait(turns[0])
        kept = jnp.int32 if problem.act == "int8" else jnp.float32
        product = pl.run_scoped(segment, plgpu.ACC(shape, kept))
        if turns is not None:
            plgpu.barrier_arrive(turns[1])
        scaled = product.astype(jnp.float32) * lax.broadcast_in_dim(scale, shape, [0])
        total = scaled if total is None else total + scaled
    assert total is not None
    return total


def _weights(
    words: list[jax.Array],
    zero: jax.Array | None,
    problem: Problem,
    index: int,
    together: int,
    interpret: bool,
) -> list[jax.Array]:
    """Weights of `together` chunks from `index` on, as arrays that sum to them."""
    if together > 1:
        return [joined.weights(words, zero, problem, index, interpret=interpret)]
    code = field(words, problem, index)
    if zero is not None:
        zero = lax.broadcast_in_dim(zero, code.shape, [0])
    if problem.act == "int8":
        return [integer_weights(code, zero, problem)]
    return float_weights(code, zero, problem, COMPUTE[problem.act])


def product(
    x: jax.Array,
    words: Any,
    scale: jax.Array,
    zero_point: jax.Array | None,
    *,
    problem: Problem,
    config: GpuConfig,
    out_dtype: Any,
    interpret: bool,
) -> jax.Array:
    """x [M, K] @ weights, for x that the tensor core takes: bfloat16, int8 or float8_e4m3fn.

    Args:
        x: Activations, already rounded or split.
        words: `Chunked`, or canonical planes, which are rearranged in every call.
        scale: [G or 1, N or 1], float32 or bfloat16.
        zero_point: The same shape, uint8, or None.
        problem: The static part.
        config: Tiles; its chunk has to be that of the words.
        out_dtype: Of the result.
        interpret: Whether the GPU interpreter runs the kernel, on any machine, and looks for races.

    Raises:
        ValueError: The words were prepared for another chunk.
    """
    if not isinstance(words, Chunked):
        words = chunked(words, problem, config.chunk)
    if config.decode not in ("smem", "registers"):
        raise ValueError(f"decode is 'smem' or 'registers', not {config.decode!r}.")
    if config.decode == "registers" and (reason := joined.why_not(problem, config.chunk)):
        raise NotImplementedError(f"{problem}: {reason}. Use decode='smem'.")
    problem = recoded(problem)
    if words.chunk != config.chunk:
        raise ValueError(f"words of chunk {words.chunk}, tiles of chunk {config.chunk}.")
    m, chunk, length = x.shape[0], config.chunk, tile(problem, config.chunk)
    piece = piece_of(problem, chunk)
    tiles, _, padded_n, _ = words.planes[0].shape
    if tiles % config.split_k:
        raise ValueError(f"split_k of {config.split_k} does not divide {tiles} tiles along K.")
    if config.blocks and config.split_k > 1:
        raise ValueError(f"blocks that stay ({config.blocks}) and split_k of {config.split_k}.")
    padded_m = round_up(m, config.bm)
    grid = (padded_m // config.bm, padded_n // BLOCK)
    units = grid[0] * grid[1]
    config = dataclasses.replace(config, blocks=min(config.blocks, units))
    kept = out_dtype if config.blocks else jnp.float32
    x = jnp.pad(x, [(0, padded_m - m), (0, tiles * length - problem.k)])
    x = joined.arranged(x, problem, chunk)

    groups = max(tiles * length // problem.group, 1) if problem.groups > 1 else 1
    fill = functools.partial(_per_group, groups=groups, n=problem.n, padded_n=padded_n)
    per_group = [fill(scale.astype(jnp.float32) * np.float32(step_of(problem, chunk)))]
    if zero_point is not None:
        dtype = jnp.int32 if problem.act == "int8" else jnp.float32
        units = 1.0 if problem.act == "int8" else step_of(problem, chunk)
        per_group.append(fill(zero_point.astype(dtype) * dtype(1 / units)))

    scales = scales_per_tile(problem, length)
    steps = tiles // config.split_k
    stages = min(config.stages, steps)
    bits = jnp.dtype(x.dtype).itemsize * 8
    rows = [plane.shape[1] for plane in words.planes]
    partial = plgpu.kernel(
        functools.partial(
            _kernel, problem=problem, config=config, tiles=tiles, interpret=interpret
        ),
        out_type=jax.ShapeDtypeStruct((config.split_k, padded_n, padded_m), kept),
        scratch_types=[
            plgpu.SMEM(
                (stages, length // piece, config.bm, piece), x.dtype, transforms=line(piece, bits)
            ),
            *(
                plgpu.SMEM((stages, r, BLOCK, chunk), jnp.int32, transforms=line(chunk, 32))
                for r in rows
            ),
            *(plgpu.SMEM((stages, scales, BLOCK), array.dtype) for array in per_group),
            plgpu.SMEM(
                (2, slots_of(problem, chunk), ROWS, piece), x.dtype, transforms=line(piece, bits)
            ),
            plgpu.SMEM((2, ROWS, config.bm), kept),
            plgpu.Barrier(num_barriers=stages, num_arrivals=1 + len(rows) + len(per_group)),
            plgpu.Barrier(num_barriers=stages, num_arrivals=2),
            *([plgpu.Barrier(num_barriers=2, num_arrivals=1)] if config.blocks else []),
        ],
        grid=(config.blocks,) if config.blocks else (*grid, config.split_k),
        grid_names=("block",) if config.blocks else ("m", "n", "split"),
        num_threads=3,
        thread_name="warpgroup",
        compiler_params=plgpu.CompilerParams(approx_math=False),
        interpret=plgpu.InterpretGPUParams(detect_races=True) if interpret else None,
    )(x, *words.planes, *per_group)
    return jnp.sum(partial, axis=0).T[:m, : problem.n].astype(out_dtype)


def _per_group(array: jax.Array, *, groups: int, n: int, padded_n: int) -> jax.Array:
    """[G or 1, N or 1] to [groups, padded N], zeros behind."""
    rows = groups if array.shape[0] == 1 else array.shape[0]
    full = jnp.broadcast_to(array, (rows, n))
    return jnp.pad(full, [(0, groups - rows), (0, padded_n - n)])
