"""Rows of activations to 8 bits, in both interpreters (the GPU's looks for races)."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import kernels_pallas
from kernels_pallas import Rounding
from kernels_pallas.rounding import hadamard
from kernels_pallas.testing import interpreting

BACKENDS = ("mosaic_gpu", "mosaic_tpu")


def prepared64(x, rounding, weight):
    """What is rounded, in float64."""
    y = np.asarray(x, np.float64)
    if rounding.prologue == "rms":
        y = y / np.sqrt(np.mean(y**2, axis=1, keepdims=True) + rounding.eps) * weight
    elif rounding.prologue == "hadamard":
        blocks = y.reshape(len(y), -1, rounding.block) @ hadamard(rounding.block)
        y = blocks.reshape(y.shape) / np.sqrt(rounding.block)
    return y


# Every prologue, act, dtype and kind of group once; K with and without padding, over 64 pieces too.
CASES = [
    (Rounding(act="int8", group=32), 2080, "float16"),
    (Rounding(act="fp8", group=256), 512, "bfloat16"),
    (Rounding(act="int8", group=64, prologue="rms", eps=1e-5), 192, "bfloat16"),
    (Rounding(act="int8", group=128, prologue="hadamard", block=32), 256, "float32"),
]


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(("rounding", "k", "dtype"), CASES)
def test_codes_are_the_nearest_and_sums_are_theirs(backend, rounding, k, dtype):
    rng = np.random.default_rng(k)
    x = jnp.asarray(rng.standard_normal((3, k)) * [[1], [0], [100]], dtype)
    weight = rng.uniform(-2, 2, k).astype(np.float32) if rounding.prologue == "rms" else None
    with interpreting(backend):
        codes, scale, sums = kernels_pallas.round_rows(
            x, rounding, None if weight is None else jnp.asarray(weight),
            backend=backend, interpret=True,
        )  # fmt: skip
    y, codes = prepared64(x, rounding, weight), np.asarray(codes, np.float64)
    largest = np.abs(y).max(axis=1, keepdims=True)
    limit, digits = (127, 0) if rounding.act == "int8" else (448, 3)
    # Sums of k squares, or of 128 products, in float32; then three roundings more.
    eps = np.finfo(np.float32).eps * (k if rounding.prologue == "rms" else 128)
    want = np.where(largest > 0, largest / limit, 1)
    np.testing.assert_allclose(scale, want, rtol=eps)
    levels = y / want
    # Half a step: 1 for int8; for e4m3 2**-3 of the power of two below, at least 2**-9.
    step = np.ones_like(levels)
    if digits:
        step = np.exp2(np.maximum(np.floor(np.log2(np.abs(levels) + 1e-30)), -6) - digits)
    assert np.all(np.abs(codes - levels) <= step / 2 * (1 + 1e-6) + 2 * eps * limit)
    assert np.abs(codes).max() == limit
    if rounding.group is None:
        assert sums is None
    else:
        expected = codes.reshape(3, -1, rounding.group).sum(axis=2)
        # e4m3: multiples of 2**-9 up to 448 * 256, 26 bits, against the 24 of float32.
        np.testing.assert_allclose(sums, expected, rtol=0, atol=0 if not digits else 2**-6)


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_row_that_is_not_finite_is_nan_and_leaves_the_others_alone(backend):
    x = jnp.asarray(np.random.default_rng(0).standard_normal((3, 128)), jnp.bfloat16)
    x = x.at[0, 5].set(jnp.inf).at[2, 7].set(jnp.nan)
    with interpreting(backend):
        codes, scale, sums = kernels_pallas.round_rows(
            x, Rounding(act="int8", group=128), backend=backend, interpret=True
        )
    np.testing.assert_array_equal(np.isnan(scale[:, 0]), [True, False, True])
    np.testing.assert_array_equal(np.asarray(codes)[[0, 2]], 0)
    np.testing.assert_array_equal(np.asarray(sums)[[0, 2]], 0)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(
    ("prologue", "act"), [(None, "int8"), ("rms", "fp8"), ("hadamard", "int8")]
)
def test_every_pass_is_lowered(backend, prologue, act):
    rounding = Rounding(act=act, group=128, prologue=prologue)
    weight = jax.ShapeDtypeStruct((4096,), jnp.float32)
    gpu = backend == "mosaic_gpu"

    def run(x, weight):
        given = weight if prologue == "rms" else None
        return kernels_pallas.round_rows(x, rounding, given, backend=backend)

    with interpreting(backend):
        traced = jax.jit(run).trace(jax.ShapeDtypeStruct((16, 4096), jnp.bfloat16), weight)
        text = traced.lower(lowering_platforms=("cuda" if gpu else "tpu",)).as_text()
    assert ("mosaic_gpu" if gpu else "tpu_custom_call") in text


def test_hadamard_is_orthogonal():
    matrix = hadamard(16).astype(int)
    np.testing.assert_array_equal(matrix @ matrix.T, 16 * np.eye(16))


def test_what_cannot_be_says_why():
    x = jnp.zeros((2, 96), jnp.bfloat16)
    call = {"backend": "mosaic_tpu", "interpret": True}
    for bad, message in (
        ({"act": "int4"}, "'int4'"),
        ({"act": "int8", "prologue": "layer"}, "'layer'"),
        ({"act": "int8", "block": 24}, "24, not a power of two"),
        ({"act": "int8", "group": 0}, "groups of 0"),
    ):
        with pytest.raises(ValueError, match=message):
            Rounding(**bad)
    for rounding, message in (
        (Rounding(act="int8", group=64), "96 does not split into groups of 64"),
        (Rounding(act="int8", group=16), "groups of 16; the kernels sum pieces of 32"),
        (Rounding(act="int8", prologue="hadamard"), "96 is not whole Hadamard blocks of 128"),
    ):
        with pytest.raises(NotImplementedError, match=message):
            kernels_pallas.round_rows(x, rounding, **call)
    with pytest.raises(NotImplementedError, match="rows of 200000 elements"):
        kernels_pallas.round_rows(jnp.zeros((1, 200_000)), Rounding(act="int8"), **call)
    with pytest.raises(ValueError, match="'rms' with no weight"):
        kernels_pallas.round_rows(x, Rounding(act="int8", prologue="rms"), **call)
    with pytest.raises(ValueError, match="unknown backend 'triton'"):
        kernels_pallas.round_rows(x, Rounding(act="int8"), backend="triton")
    empty = kernels_pallas.round_rows(x[:0], Rounding(act="int8", group=32), **call)
    assert [part.shape for part in empty] == [(0, 96), (0, 1), (0, 3)]
