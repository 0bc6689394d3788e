"""Formats by name, random operands and the judgement of a result: for tests and benchmarks."""

import contextlib
from contextlib import AbstractContextManager
from typing import Any, Final

import jax
import jax.numpy as jnp
import numpy as np

from kernels_pallas import reference
from kernels_pallas.problem import E2M1, Affine, Problem, Table

# QLoRA's NF4 (arXiv:2305.14314, appendix E).
NF4: Final = (
    -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635,
    -0.18477343022823334, -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725,
    0.24611230194568634, 0.33791524171829224, 0.44070982933044434, 0.5626170039176941,
    0.7229568362236023, 1.0,
)  # fmt: skip

FORMATS: Final[dict[str, dict[str, Any]]] = {
    "binary": {"bits": 1, "levels": Affine(-1, 2)},
    "int2_half": {"bits": 2, "levels": Affine(-1.5)},
    "ternary": {"bits": 2, "levels": Affine(-1, count=3)},
    "uint2": {"bits": 2, "levels": Affine(0), "zero_points": True},
    "int3": {"bits": 3, "levels": Affine(-4)},
    "int4": {"bits": 4, "levels": Affine(-8)},
    "uint4": {"bits": 4, "levels": Affine(0), "zero_points": True},
    "int5": {"bits": 5, "levels": Affine(-16)},
    "int6": {"bits": 6, "levels": Affine(-32)},
    "int7": {"bits": 7, "levels": Affine(-64)},
    "int8": {"bits": 8, "levels": Affine(-128)},
    "uint8": {"bits": 8, "levels": Affine(0), "zero_points": True},
    "nf4": {"bits": 4, "levels": Table(NF4)},
    "fp4": {"bits": 4, "levels": Table(E2M1)},
    "codebook3": {"bits": 3, "levels": Table((-3.0, -1.5, -0.5, 0.0, 0.25, 1.0, 2.0, 5.0))},
}


def described(kind: str, platform: str, cores: int) -> AbstractContextManager[Any]:
    """A device that is asked for and not there: what interpreters and lowerings take for it."""
    device = jax.sharding.AbstractDevice(device_kind=kind, platform=platform, num_cores=cores)
    return jax.sharding.use_abstract_mesh(jax.sharding.AbstractMesh((), (), abstract_device=device))


def interpreting(backend: str) -> AbstractContextManager[Any]:
    """What a backend's interpreter needs around a call: the GPU's asks for the device."""
    if backend == "mosaic_tpu":
        return contextlib.nullcontext()
    return described("NVIDIA H200", "gpu", 132)


def problem(
    fmt: str, k: int, n: int, group: int, act: Any = None, dtype: str = "bfloat16"
) -> Problem:
    """A problem of a named format whose activations and result have one dtype."""
    return Problem(**FORMATS[fmt], k=k, n=n, group=group, act=act, x_dtype=dtype, out_dtype=dtype)


def operands(
    p: Problem, m: int, seed: int = 0
) -> tuple[jax.Array, tuple[jax.Array, ...], jax.Array, jax.Array | None]:
    """x [m, k], words, scale and zero point. The last row of x has an outlier of 1e4 (100 in
    float16, whose results would overflow); the first column of codes is all smallest, the last all
    largest.
    """
    rng = np.random.default_rng(seed)
    codes = rng.integers(0, p.codes, (p.k, p.n)).astype(np.uint8)
    codes[:, 0], codes[:, -1] = 0, p.codes - 1
    words = tuple(jnp.asarray(plane) for plane in reference.pack(codes, p))
    scale = jnp.asarray(rng.uniform(0.5, 1.5, (p.groups, p.n)), jnp.float32)
    zero_point = None
    if p.zero_points:
        zero_point = jnp.asarray(rng.integers(0, 2**p.bits, (p.groups, p.n)), jnp.uint8)
    x = rng.standard_normal((m, p.k))
    x[-1:, p.k // 2] = 1e2 if p.x_dtype == jnp.float16 else 1e4
    return jnp.asarray(x, p.x_dtype), words, scale, zero_point


def assert_close(
    got: jax.Array, x: Any, words: Any, scale: Any, zero_point: Any, p: Problem
) -> None:
    """Raises AssertionError unless `got` is within the error that `reference.matmul64` allows."""
    want, bound = reference.matmul64(x, words, scale, zero_point, p)
    assert got.dtype == p.out_dtype
    assert got.shape == want.shape
    error = np.abs(np.asarray(got, np.float64) - want)
    assert np.all(error <= bound), f"worst error: {np.max(error / bound):.3g} of the bound"
