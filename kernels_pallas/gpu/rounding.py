"""Rows of activations to 8 bits on Hopper; see `kernels_pallas.rounding`.

One block of one warpgroup takes one row, seen as [pieces, unit] of consecutive elements, 64 pieces
at a time: the 64 rows of the tensor core's layout, in which sums and maxima over a piece stay in
four threads, and in which 64 pieces times a Hadamard matrix is one product. The row is brought to
shared memory once; what a prologue makes of it stays there too.
"""

import functools
from typing import Any, Final

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from kernels_pallas.activations import LARGEST, PARTS, truncated
from kernels_pallas.config import round_up
from kernels_pallas.gpu.layout import line
from kernels_pallas.rounding import Rounding, hadamard, unit_of

PIECES: Final = 64
_MAGIC: Final = 1.5 * 2.0**23  # added to a small number, it leaves its nearest integer below
_LAYOUT: Final = plgpu.Layout.WGMMA


def _over_row(values: jax.Array, across: Any, largest: bool) -> jax.Array:
    """One number of every piece, [64] -> the maximum or sum over all of them, in each of [64]."""
    across[...] = values
    plgpu.commit_smem()
    columns = plgpu.load(across, layout=_LAYOUT.reduce(0))
    square = lax.broadcast_in_dim(columns, (PIECES, PIECES), [1])
    # Several of these follow each other through the same memory.
    plgpu.commit_smem()
    return jnp.max(square, axis=1) if largest else jnp.sum(square, axis=1)


def _kernel(*refs: Any, rounding: Rounding, k: int, steps: int, unit: int) -> None:
    """x [M, pieces, unit], weight or H -> codes like x, scale [M, 64], sums [M, pieces]."""
    extra = 1 if rounding.prologue else 0
    sources, (codes_out, scale_out, sums_out) = refs[: 1 + extra], refs[1 + extra : 4 + extra]
    x_shared, *rest = refs[4 + extra :]
    extra_shared, rest = rest[:extra], rest[extra:]
    codes_shared, scale_shared, sums_shared, across, ready, *held = rest
    row = lax.axis_index("m")
    shape = (PIECES, unit)
    for step in range(steps):
        pieces = pl.ds(step * PIECES, PIECES)
        plgpu.copy_gmem_to_smem(sources[0].at[row, pieces], x_shared.at[step], ready)
        if rounding.prologue == "rms":
            plgpu.copy_gmem_to_smem(sources[1].at[pieces], extra_shared[0].at[step], ready)
    if rounding.prologue == "hadamard":
        plgpu.copy_gmem_to_smem(sources[1], extra_shared[0], ready)
    plgpu.barrier_wait(ready)

    def loaded(step: Any) -> jax.Array:
        return plgpu.load(x_shared.at[step], layout=_LAYOUT).astype(jnp.float32)

    def over(values: jax.Array) -> jax.Array:
        return lax.broadcast_in_dim(values, shape, [0])

    zeros = plgpu.layout_cast(jnp.zeros((PIECES,), jnp.float32), _LAYOUT.reduce(1))
    if rounding.prologue == "rms":

        def squares(step: Any, total: jax.Array) -> jax.Array:
            y = loaded(step)
            return total + jnp.sum(y * y, axis=1)

        total = _over_row(lax.fori_loop(0, steps, squares, zeros), across, largest=False)
        factor = lax.rsqrt(total * np.float32(1 / k) + np.float32(rounding.eps))

    def transformed(step: Any) -> jax.Array:
        y = loaded(step)
        if rounding.prologue == "rms":
            weight = plgpu.load(extra_shared[0].at[step], layout=_LAYOUT)
            return y * over(factor) * weight
        if rounding.prologue == "hadamard":
            rest = y
            count = held[1].shape[0]
            for part in range(count):
                high = truncated(rest) if part + 1 < count else rest
                held[1][part] = high.astype(jnp.bfloat16)
                rest = rest - high
            plgpu.commit_smem()

            def rotated(acc: Any) -> jax.Array:
                for part in range(count):
                    plgpu.wgmma(acc, held[1].at[part], extra_shared[0])
                return acc[...]

            y = pl.run_scoped(rotated, plgpu.ACC(shape, jnp.float32))
            return y * np.float32(rounding.block**-0.5)
        return y

    def magnitudes(step: Any, most: jax.Array) -> jax.Array:
        y = transformed(step)
        if rounding.prologue:
            held[0][step] = y
        magnitude = jnp.abs(y)
        magnitude = jnp.where(magnitude < np.float32(np.inf), magnitude, np.float32(np.inf))
        return jnp.maximum(most, jnp.max(magnitude, axis=1))

    absmax = _over_row(lax.fori_loop(0, steps, magnitudes, zeros), across, largest=True)
    finite = absmax < np.float32(np.inf)
    scale = absmax * np.float32(1 / LARGEST[rounding.act])
    scale = jnp.where(scale > 0, scale, np.float32(1))
    inverse = jnp.where(finite, 1 / scale, np.float32(0))
    scale_shared[...] = jnp.where(finite, scale, np.float32(np.nan))
    largest = np.float32(LARGEST[rounding.act])

    @pl.loop(0, steps)
    def _(step: Any) -> None:
        y = plgpu.load(held[0].at[step], layout=_LAYOUT) if rounding.prologue else loaded(step)
        y = jnp.where(over(finite), y, np.float32(0)) * over(inverse)
        y = jnp.minimum(jnp.maximum(y, -largest), largest)
        if rounding.act == "int8":
            shifted = y + np.float32(_MAGIC)
            levels = shifted - np.float32(_MAGIC)
            bits = lax.bitcast_convert_type(shifted, jnp.int32)
            base = int(np.float32(_MAGIC).view(np.int32))
            codes = (bits - np.int32(base)).astype(jnp.int8)
        else:
            codes = y.astype(jnp.float8_e4m3fn)
            levels = codes.astype(jnp.float32)
        codes_shared[step] = codes
        sums_shared[step] = jnp.sum(levels, axis=1)

    plgpu.commit_smem()
    for step in range(steps):
        pieces = pl.ds(step * PIECES, PIECES)
        plgpu.copy_smem_to_gmem(codes_shared.at[step], codes_out.at[row, pieces])
        plgpu.copy_smem_to_gmem(sums_shared.at[step], sums_out.at[row, pieces])
    plgpu.copy_smem_to_gmem(scale_shared, scale_out.at[row])
    plgpu.wait_smem_to_gmem(0)


def round_rows(
    x: jax.Array, rounding: Rounding, weight: jax.Array | None, *, interpret: bool
) -> tuple[jax.Array, jax.Array, jax.Array | None]:
    """See `kernels_pallas.rounding.reference`."""
    m, k = x.shape
    unit = unit_of(rounding)
    pieces = round_up(-(-k // unit), PIECES)
    steps = pieces // PIECES
    padding = pieces * unit - k
    arguments = [jnp.pad(x, [(0, 0), (0, padding)]).reshape(m, pieces, unit)]
    bits = x.dtype.itemsize * 8
    scratch: list[Any] = [plgpu.SMEM((steps, PIECES, unit), x.dtype, transforms=line(unit, bits))]
    arrivals = steps
    if rounding.prologue == "rms":
        assert weight is not None
        padded = jnp.pad(weight.astype(jnp.float32), (0, padding)).reshape(pieces, unit)
        arguments.append(padded)
        scratch.append(plgpu.SMEM((steps, PIECES, unit), jnp.float32, transforms=line(unit, 32)))
        arrivals += steps
    elif rounding.prologue == "hadamard":
        blocks = np.kron(np.eye(unit // rounding.block), hadamard(rounding.block))
        arguments.append(jnp.asarray(blocks, jnp.bfloat16))
        scratch.append(plgpu.SMEM((unit, unit), jnp.bfloat16, transforms=line(unit, 16)))
        arrivals += 1
    code = jnp.int8 if rounding.act == "int8" else jnp.float8_e4m3fn
    scratch += [
        plgpu.SMEM((steps, PIECES, unit), code, transforms=line(unit, 8)),
        plgpu.SMEM((PIECES,), jnp.float32),
        plgpu.SMEM((steps, PIECES), jnp.float32),
        plgpu.SMEM((PIECES,), jnp.float32),
        plgpu.Barrier(num_arrivals=arrivals),
    ]
    if rounding.prologue:
        scratch.append(plgpu.SMEM((steps, PIECES, unit), jnp.float32, transforms=line(unit, 32)))
    if rounding.prologue == "hadamard":
        parts = PARTS[x.dtype.name]
        scratch.append(plgpu.SMEM((parts, PIECES, unit), jnp.bfloat16, transforms=line(unit, 16)))
    codes, scale, sums = plgpu.kernel(
        functools.partial(_kernel, rounding=rounding, k=k, steps=steps, unit=unit),
        out_type=[
            jax.ShapeDtypeStruct((m, pieces, unit), code),
            jax.ShapeDtypeStruct((m, PIECES), jnp.float32),
            jax.ShapeDtypeStruct((m, pieces), jnp.float32),
        ],
        scratch_types=scratch,
        grid=(m,),
        grid_names=("m",),
        compiler_params=plgpu.CompilerParams(approx_math=False),
        interpret=plgpu.InterpretGPUParams(detect_races=True) if interpret else None,
    )(*arguments)
    codes, scale = codes.reshape(m, -1)[:, :k], scale[:, :1]
    if rounding.group is None:
        return codes, scale, None
    sums = sums[:, : k // unit].reshape(m, -1, rounding.group // unit).sum(axis=2)
    return codes, scale, sums
