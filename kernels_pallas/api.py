"""The entry to the kernels: arrays in, arrays out; what cannot be computed is said beforehand."""

import importlib
from typing import Any, Final, Literal

import jax
import jax.numpy as jnp

from kernels_pallas import rounding as rounding_
from kernels_pallas.activations import PARTS, quantize_rows, split
from kernels_pallas.attention import Attention
from kernels_pallas.config import GpuConfig, TpuConfig
from kernels_pallas.problem import Problem
from kernels_pallas.rounding import Rounding

Backend = Literal["mosaic_gpu", "mosaic_tpu"]
_FOLDERS: Final[dict[str, str]] = {"mosaic_gpu": "gpu", "mosaic_tpu": "tpu"}


def supported(problem: Problem, backend: Backend) -> str | None:
    """Why the backend does not compute the problem, in words that finish "because"; None: it does.

    Raises:
        ValueError: An unknown backend.
    """
    return _module(backend).why_not(problem)


def prepare(words: tuple[jax.Array, ...], problem: Problem, backend: Backend) -> Any:
    """The words in the order the backend reads fastest; made once, at load, and never saved.

    Raises:
        ValueError: An unknown backend, or planes that are not those of the problem.
        NotImplementedError: The backend does not compute the problem.
    """
    _check(problem, backend)
    for plane, width in zip(words, problem.widths, strict=True):
        if plane.shape != problem.plane_shape(width):
            raise ValueError(
                f"prepare: a plane of {width} bits has shape {plane.shape}; {problem.k} x "
                f"{problem.n} codes take {problem.plane_shape(width)}."
            )
    return _module(backend).prepare(words, problem)


def restore(words: Any, problem: Problem, backend: Backend) -> tuple[jax.Array, ...]:
    """The inverse of `prepare`: canonical planes, without what padded them.

    Raises:
        ValueError: An unknown backend.
    """
    return _module(backend).restore(words, problem)


def matmul(
    x: jax.Array,
    words: Any,
    scale: jax.Array,
    zero_point: jax.Array | None = None,
    *,
    problem: Problem,
    backend: Backend,
    interpret: bool = False,
    config: TpuConfig | GpuConfig | None = None,
) -> jax.Array:
    """x @ weights, by the kernel of one backend.

    Args:
        x: Activations [M, k], any M, also 0.
        words: What `prepare` returned, or (TPU) the canonical planes themselves.
        scale: [groups or 1, n or 1], float32 or bfloat16, any global scale multiplied in.
        zero_point: The same shape, uint8; None where the problem has none.
        problem: The static part.
        backend: "mosaic_gpu" (Hopper) or "mosaic_tpu".
        interpret: Whether the backend's interpreter runs the kernel, on any machine.
        config: Tiles; None takes those of the tuning table, else a heuristic.

    Returns:
        [M, n] of `problem.out_dtype`. NaN and infinity in a row of `x` reach that row; a row that
        is rounded to 8 bits and not finite is all NaN.

    Raises:
        ValueError: Arrays that are not those of the problem.
        NotImplementedError: The backend does not compute the problem, with the reason.
    """
    _check(problem, backend)
    _check_arrays(x, scale, zero_point, problem)
    module, m = _module(backend), x.shape[0]
    if m == 0:
        return jnp.zeros((0, problem.n), problem.out_dtype)
    row_scale = None
    if problem.act is not None:
        rows, row_scale = _rounded(x, problem.act, backend, interpret)
    else:
        rows = split(x).reshape(-1, problem.k)
    if config is None:
        config = module.choose(problem, rows.shape[0], _device_kind())
    direct = row_scale is None and rows.shape[0] == m
    y = module.product(
        rows, words, scale, zero_point,
        problem=problem, config=config, interpret=interpret,
        out_dtype=problem.out_dtype if direct else jnp.float32,
    )  # fmt: skip
    if direct:
        return y
    if row_scale is not None:
        return (y * row_scale).astype(problem.out_dtype)
    return jnp.sum(y.reshape(-1, m, problem.n), axis=0).astype(problem.out_dtype)


def round_rows(
    x: jax.Array,
    rounding: Rounding,
    weight: jax.Array | None = None,
    *,
    backend: Backend,
    interpret: bool = False,
) -> tuple[jax.Array, jax.Array, jax.Array | None]:
    """Rows to 8 bits, by the kernel of one backend; see `kernels_pallas.rounding`.

    Args:
        x: Activations [M, K], bfloat16, float16 or float32.
        rounding: The static part.
        weight: Of RMSNorm, [K]; None without it.
        backend: "mosaic_gpu" (Hopper) or "mosaic_tpu".
        interpret: Whether the backend's interpreter runs the kernel, on any machine.

    Returns:
        Codes, int8 or float8_e4m3fn [M, K]; scales, float32 [M, 1] (1 where a row is zero, NaN
        where it is not finite); sums of the codes of every group, float32 [M, G] (whole numbers
        with int8), or None without groups.

    Raises:
        ValueError: An unknown backend, x that is no matrix, a weight that is missing, of another
            length or without use.
        NotImplementedError: The kernels do not make such a pass; the message says why.
    """
    kernels = _module(backend, "rounding")
    if x.ndim != 2:
        raise ValueError(f"round_rows: x has shape {x.shape}; it takes [M, K].")
    if (rounding.prologue == "rms") != (weight is not None):
        raise ValueError(
            f"round_rows: prologue {rounding.prologue!r} with "
            f"{'no weight' if weight is None else 'a weight'}; RMSNorm alone takes one."
        )
    if weight is not None and weight.shape != x.shape[1:]:
        raise ValueError(f"round_rows: a weight of shape {weight.shape} for K of {x.shape[1]}.")
    if reason := rounding_.why_not(rounding, x.shape[1], x.dtype):
        raise NotImplementedError(f"round_rows: {rounding} is not computed: {reason}.")
    if 0 in x.shape:
        return rounding_.reference(x, rounding, weight)
    return kernels.round_rows(x, rounding, weight, interpret=interpret)


def attend_unsupported(attention: Attention, capacity: int, backend: Backend) -> str | None:
    """Why the backend has no kernel for a cache of so many positions; None: it has one.

    Raises:
        ValueError: An unknown backend.
    """
    return _module(backend, "attention").why_not(attention, capacity)


def attend(
    query: jax.Array,
    keys: tuple[jax.Array, jax.Array],
    values: tuple[jax.Array, jax.Array],
    start: jax.Array | int,
    stop: jax.Array | int,
    *,
    attention: Attention,
    backend: Backend,
    splits: int | None = None,
    interpret: bool = False,
) -> jax.Array:
    """Attention of one new token over packed keys and values, by the kernel of one backend.

    Args:
        query: [B, heads, head_dim]; bfloat16, float16 or float32.
        keys: Words, int32 [B, S, kv_heads, attention.words], and scales [B, S, kv_heads] of any
            float dtype; see `kernels_pallas.attention`.
        values: As `keys`.
        start: First position that is seen.
        stop: Behind the last one; at least one is seen.
        attention: The static part.
        backend: "mosaic_gpu" (Hopper) or "mosaic_tpu".
        splits: Parts of the positions that are worked on at the same time; None: as many as keep
            the device busy. The result depends on it in its last bits, and on nothing else.
        interpret: Whether the backend's interpreter runs the kernel, on any machine.

    Returns:
        [B, heads, head_dim], in the dtype of `query`. A scale of NaN at a position that is seen
        makes its key head's results NaN.

    Raises:
        ValueError: Arrays that do not fit each other, or less than one part.
        NotImplementedError: The backend has no kernel for such a cache, with the reason.
    """
    expected = (query.shape[0], attention.heads, attention.head_dim)
    if query.shape != expected or query.dtype.name not in PARTS:
        raise ValueError(
            f"attend: query is {query.dtype.name}{list(query.shape)}; it takes bfloat16, float16 "
            f"or float32 {list(expected)}."
        )
    capacity = keys[0].shape[1] if keys[0].ndim == 4 else 0
    rows = (query.shape[0], capacity, attention.kv_heads)
    for name, (words, scale) in (("keys", keys), ("values", values)):
        if words.shape != (*rows, attention.words) or scale.shape != rows or capacity == 0:
            raise ValueError(
                f"attend: {name} have words {words.shape} and scales {scale.shape}; they take "
                f"{(*rows, attention.words)} and {rows}."
            )
    if splits is not None and splits < 1:
        raise ValueError(f"attend: {splits} parts of the positions.")
    if reason := attend_unsupported(attention, capacity, backend):
        raise NotImplementedError(f"attend: {backend} has no kernel for {attention}: {reason}.")
    if query.shape[0] == 0:
        return jnp.zeros(expected, query.dtype)
    bounds = jnp.stack([jnp.asarray(start, jnp.int32), jnp.asarray(stop, jnp.int32)])
    return _module(backend, "attention").attend(
        query, keys, values, bounds, attention, splits=splits, interpret=interpret
    )


def _rounded(
    x: jax.Array, act: Literal["int8", "fp8"], backend: Backend, interpret: bool
) -> tuple[jax.Array, jax.Array]:
    """Codes and scales of rows: by the kernel, or by XLA where rows are too long for it."""
    rounding = Rounding(act=act)
    if rounding_.why_not(rounding, x.shape[1], x.dtype) is not None:
        return quantize_rows(x, act)
    codes, scale, _ = round_rows(x, rounding, backend=backend, interpret=interpret)
    return codes, scale


def _device_kind() -> str:
    """The kind that is compiled for: of the abstract mesh where one is set, else of the machine."""
    device = jax.sharding.get_abstract_mesh().abstract_device
    return jax.devices()[0].device_kind if device is None else device.device_kind


def _module(backend: str, operation: str = "matmul") -> Any:
    """The operation's kernels for a backend.

    Loaded when asked for: Pallas' GPU half is a fourth of the time that importing the library
    takes, and most programs never need it.
    """
    if backend not in _FOLDERS:
        raise ValueError(f"unknown backend {backend!r}; there are {sorted(_FOLDERS)}.")
    return importlib.import_module(f"kernels_pallas.{_FOLDERS[backend]}.{operation}")


def _check(problem: Problem, backend: Backend) -> None:
    if reason := supported(problem, backend):
        raise NotImplementedError(f"{backend}: {problem} is not computed, because {reason}.")


def _check_arrays(
    x: jax.Array, scale: jax.Array, zero_point: jax.Array | None, problem: Problem
) -> None:
    """Raises ValueError where an array is not what the problem says."""
    if x.ndim != 2 or x.shape[1] != problem.k or x.dtype != problem.x_dtype:
        raise ValueError(
            f"matmul: x is {x.dtype.name}{list(x.shape)}; the problem has "
            f"{problem.x_dtype.name}[M, {problem.k}]."
        )
    if problem.zero_points != (zero_point is not None):
        raise ValueError(
            f"matmul: problem.zero_points is {problem.zero_points}, and zero_point is "
            f"{'None' if zero_point is None else 'given'}."
        )
    for name, array in (("scale", scale), ("zero_point", zero_point)):
        if array is None:
            continue
        rows, columns = array.shape
        if rows not in (1, problem.groups) or columns not in (1, problem.n):
            raise ValueError(
                f"matmul: {name} has shape {array.shape}; it takes "
                f"({problem.groups} or 1, {problem.n} or 1)."
            )
