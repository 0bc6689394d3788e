"""Rows of activations to 8 bits on TPU; see `kernels_pallas.rounding`.

A block is some rows with all of K, in VMEM. Sums over groups narrower than the 128 lanes, and
rotations, are products on the MXU: with a matrix of ones and zeros, which is exact for codes of 8
bits, and with the Hadamard matrix, in the precision of float32.
"""

import functools
from typing import Any, Final

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from kernels_pallas.activations import LARGEST
from kernels_pallas.config import round_up
from kernels_pallas.rounding import Rounding, hadamard

LANES: Final = 128
ROWS: Final = 32  # of a tile of 8-bit codes


def _kernel(*refs: Any, rounding: Rounding, k: int) -> None:
    """x [ROWS, K padded], weight [1, K]?, H [block, block]? -> codes, scale [ROWS, 1], sums?."""
    outputs = 2 if rounding.group is None else 3
    x_ref, *extra = refs[:-outputs]
    codes_ref, scale_ref, *sums_ref = refs[-outputs:]
    y = x_ref[...].astype(jnp.float32)
    if rounding.prologue == "rms":
        mean = jnp.sum(y * y, axis=1, keepdims=True) * np.float32(1 / k)
        y = y * lax.rsqrt(mean + np.float32(rounding.eps)) * extra[0][...]
    elif rounding.prologue == "hadamard":
        matrix = extra[0][...]
        parts = [
            jnp.dot(y[:, at : at + LANES], matrix, precision=lax.Precision.HIGHEST)
            for at in range(0, y.shape[1], LANES)
        ]
        y = jnp.concatenate(parts, axis=1) * np.float32(rounding.block**-0.5)
    largest = np.float32(LARGEST[rounding.act])
    magnitude = jnp.abs(y)
    # What is not finite becomes infinity, which every maximum keeps.
    magnitude = jnp.where(magnitude < np.float32(np.inf), magnitude, np.float32(np.inf))
    absmax = jnp.max(magnitude, axis=1, keepdims=True)
    finite = absmax < np.float32(np.inf)
    scale = absmax * np.float32(1 / LARGEST[rounding.act])
    scale = jnp.where(scale > 0, scale, jnp.ones_like(scale))
    levels = jnp.where(finite, y * (1 / scale), jnp.zeros_like(y))
    levels = jnp.clip(levels, -largest, largest)
    if rounding.act == "int8":
        levels = jnp.round(levels)
        codes = levels.astype(jnp.int32).astype(jnp.int8)
    else:
        codes = levels.astype(jnp.float8_e4m3fn)
        levels = codes.astype(jnp.float32)
    codes_ref[...] = codes
    scale_ref[...] = jnp.where(finite, scale, jnp.full_like(scale, np.nan))
    if rounding.group is not None:
        sums_ref[0][...] = _sums(levels, rounding.group)


def _sums(levels: jax.Array, group: int) -> jax.Array:
    """Sums of groups, float32 [ROWS, G]; every partial sum is exact."""
    if group % LANES == 0:
        starts = range(0, levels.shape[1], group)
        parts = [jnp.sum(levels[:, at : at + group], axis=1, keepdims=True) for at in starts]
        return jnp.concatenate(parts, axis=1)
    per = LANES // group
    owner = lax.broadcasted_iota(jnp.int32, (LANES, LANES), 0) // np.int32(group)
    column = lax.broadcasted_iota(jnp.int32, (LANES, LANES), 1)
    ones = jnp.where(owner == column, 1.0, 0.0).astype(jnp.bfloat16)
    pieces = [
        jnp.dot(
            levels[:, at : at + LANES].astype(jnp.bfloat16),
            ones,
            preferred_element_type=jnp.float32,
        )[:, :per]
        for at in range(0, levels.shape[1], LANES)
    ]
    return jnp.concatenate(pieces, axis=1)


def round_rows(
    x: jax.Array, rounding: Rounding, weight: jax.Array | None, *, interpret: bool
) -> tuple[jax.Array, jax.Array, jax.Array | None]:
    """See `kernels_pallas.rounding.reference`; K is padded to whole lanes, M to whole tiles."""
    m, k = x.shape
    rows, width = round_up(m, ROWS), round_up(k, LANES)
    arguments = [jnp.pad(x, [(0, rows - m), (0, width - k)])]
    row_spec = pl.BlockSpec((ROWS, width), lambda i: (i, 0))
    specs = [row_spec]
    if rounding.prologue == "rms":
        assert weight is not None
        arguments.append(jnp.pad(weight.astype(jnp.float32)[None], [(0, 0), (0, width - k)]))
        specs.append(pl.BlockSpec((1, width), lambda i: (0, 0)))
    elif rounding.prologue == "hadamard":
        # Several blocks side by side, so that a product is as wide as the lanes.
        blocks = np.kron(np.eye(LANES // rounding.block), hadamard(rounding.block))
        arguments.append(jnp.asarray(blocks, jnp.float32))
        specs.append(pl.BlockSpec((LANES, LANES), lambda i: (0, 0)))
    code = jnp.int8 if rounding.act == "int8" else jnp.float8_e4m3fn
    shapes = [
        jax.ShapeDtypeStruct((rows, width), code),
        jax.ShapeDtypeStruct((rows, 1), jnp.float32),
    ]
    out_specs = [row_spec, pl.BlockSpec((ROWS, 1), lambda i: (i, 0))]
    if rounding.group is not None:
        groups = width // rounding.group
        shapes.append(jax.ShapeDtypeStruct((rows, groups), jnp.float32))
        out_specs.append(pl.BlockSpec((ROWS, groups), lambda i: (i, 0)))
    codes, scale, *sums = pl.pallas_call(
        functools.partial(_kernel, rounding=rounding, k=k),
        grid=(rows // ROWS,),
        in_specs=specs,
        out_specs=out_specs,
        out_shape=shapes,
        compiler_params=pltpu.CompilerParams(dimension_semantics=("parallel",)),
        interpret=pltpu.InterpretParams(out_of_bounds_reads="uninitialized")
        if interpret
        else False,
        name=f"round_rows_{rounding.act}",
    )(*arguments)
    groups = 0 if rounding.group is None else k // rounding.group
    return codes[:m, :k], scale[:m], sums[0][:m, :groups] if sums else None
