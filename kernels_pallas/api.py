"""The entry to the kernels: arrays in, arrays out; what cannot be computed is said beforehand."""

from typing import Any, Final, Literal

import jax
import jax.numpy as jnp

from kernels_pallas.activations import quantize_rows, split
from kernels_pallas.config import GpuConfig, TpuConfig
from kernels_pallas.gpu import matmul as gpu_matmul
from kernels_pallas.problem import Problem
from kernels_pallas.tpu import matmul as tpu_matmul

Backend = Literal["mosaic_gpu", "mosaic_tpu"]
_MODULES: Final[dict[str, Any]] = {"mosaic_gpu": gpu_matmul, "mosaic_tpu": tpu_matmul}


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
        rows, row_scale = quantize_rows(x, problem.act)
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


def _device_kind() -> str:
    """The kind that is compiled for: of the abstract mesh where one is set, else of the machine."""
    device = jax.sharding.get_abstract_mesh().abstract_device
    return jax.devices()[0].device_kind if device is None else device.device_kind


def _module(backend: str) -> Any:
    if backend not in _MODULES:
        raise ValueError(f"unknown backend {backend!r}; there are {sorted(_MODULES)}.")
    return _MODULES[backend]


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
