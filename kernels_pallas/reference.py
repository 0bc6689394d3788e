"""What every kernel must compute: in float64 with numpy, and in float32 with plain jnp.

The float64 form is the judge of the tests, with the error it allows; the jnp form is the same in
twenty lines, for reading and for machines that have no kernel.
"""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from kernels_pallas.activations import quantize_rows
from kernels_pallas.problem import WORD, Problem, level_values


def codes(words: tuple[Any, ...], problem: Problem) -> Any:
    """Planes to codes, uint8 [k, N]; numpy in, numpy out, jax in, jax out."""
    xp = np if isinstance(words[0], np.ndarray) else jnp
    total, low = None, 0
    for plane, width in zip(words, problem.widths, strict=True):
        shifts = (xp.arange(WORD // width, dtype=xp.uint32) * xp.uint32(width))[None, :, None]
        fields = (plane.view(xp.uint32)[:, None, :] >> shifts) & xp.uint32(2**width - 1)
        part = fields.reshape(-1, plane.shape[1]) << xp.uint32(low)
        total = part if total is None else total | part
        low += width
    assert total is not None
    return total[: problem.k].astype(xp.uint8)


def pack(codes: np.ndarray, problem: Problem) -> tuple[np.ndarray, ...]:
    """The inverse of `codes`: canonical planes, K padded with code 0. For tests and benchmarks."""
    padding = problem.padded_k - problem.k
    wide = np.pad(codes.astype(np.uint32), [(0, padding), (0, 0)])
    planes, low = [], 0
    for width in problem.widths:
        fields = (wide >> np.uint32(low)) & np.uint32(2**width - 1)
        fields = fields.reshape(-1, WORD // width, problem.n)
        shifts = (np.arange(WORD // width, dtype=np.uint32) * np.uint32(width))[None, :, None]
        planes.append(np.sum(fields << shifts, axis=1, dtype=np.uint32).view(np.int32))
        low += width
    return tuple(planes)


def expand(array: Any, problem: Problem) -> Any:
    """A scale or zero point [G or 1, N or 1] to one row per element of K, [k or 1, N or 1]."""
    xp = np if isinstance(array, np.ndarray) else jnp
    return array if array.shape[0] == 1 else xp.repeat(array, problem.group, axis=0)


def weights64(
    words: tuple[Any, ...], scale: Any, zero_point: Any | None, problem: Problem
) -> np.ndarray:
    """The dequantized kernel, float64 [k, N]."""
    planes = tuple(np.asarray(plane) for plane in words)
    levels = level_values(problem)
    levels = np.pad(levels, (0, 2**problem.bits - levels.size))[codes(planes, problem)]
    if zero_point is not None:
        levels = levels - expand(np.asarray(zero_point, np.float64), problem)
    return levels * expand(np.asarray(scale, np.float64), problem)


def activations64(x: Any, problem: Problem) -> np.ndarray:
    """The activations that are multiplied, float64 [M, k]: rounded to 8 bits if `act` says so."""
    if problem.act is None:
        return np.asarray(x, np.float64)
    rounded, scale = quantize_rows(jnp.asarray(x), problem.act)
    return np.asarray(rounded, np.float64) * np.asarray(scale, np.float64)


def matmul64(
    x: Any, words: tuple[Any, ...], scale: Any, zero_point: Any | None, problem: Problem
) -> tuple[np.ndarray, np.ndarray]:
    """The product in float64 and the error a kernel may make, both [M, N].

    The error is half a unit in the last place of y, for the one rounding at the end, and 2e-6 * sum
    |x w| for a float32 accumulation of exact products: 33 roundings of 2**-24, each of the whole.
    """
    activations, weights = activations64(x, problem), weights64(words, scale, zero_point, problem)
    with np.errstate(invalid="ignore"):
        y = activations @ weights
        magnitude = np.abs(activations) @ np.abs(weights)
    unit = float(jnp.finfo(problem.out_dtype).eps)
    smallest = float(jnp.finfo(problem.out_dtype).smallest_subnormal)
    return y, unit / 2 * np.abs(y) + 2e-6 * magnitude * (1 + unit) + smallest


def matmul(
    x: jax.Array,
    words: tuple[jax.Array, ...],
    scale: jax.Array,
    zero_point: jax.Array | None,
    problem: Problem,
) -> jax.Array:
    """The product in float32, plain jnp: unpack, dequantize, one matmul."""
    levels = jnp.asarray(level_values(problem), jnp.float32)[codes(words, problem)]
    if zero_point is not None:
        levels = levels - expand(zero_point.astype(jnp.float32), problem)
    weights = levels * expand(scale.astype(jnp.float32), problem)
    row_scale = None
    if problem.act is not None:
        x, row_scale = quantize_rows(x, problem.act)
    y = jnp.dot(x.astype(jnp.float32), weights, precision="highest")
    return (y if row_scale is None else y * row_scale).astype(problem.out_dtype)
