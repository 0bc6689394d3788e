"""The TPU kernel in the TPU interpreter, against float64."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import kernels_pallas
from kernels_pallas import Affine, Problem, TpuConfig, reference
from kernels_pallas.testing import assert_close, operands, problem
from kernels_pallas.tpu.matmul import prepare
from kernels_pallas.tpu.plan import heuristic

# Every format, act, kind of group and number of rows once; K and N with and without padding.
CASES = [
    ("binary", 256, 128, 128, None, "bfloat16", 1),
    ("int2_half", 256, 128, 64, "int8", "bfloat16", 2),
    ("int2_half", 256, 128, 128, None, "bfloat16", 2),
    ("ternary", 288, 100, 288, "int8", "bfloat16", 7),
    ("int3", 256, 128, 128, "fp8", "bfloat16", 9),
    ("int4", 512, 136, 512, None, "float32", 16),
    ("int4", 256, 128, 128, "int8", "float32", 33),
    ("uint4", 256, 128, 128, None, "float16", 3),
    ("int7", 256, 128, 256, "int8", "bfloat16", 2),
    ("uint8", 256, 128, 128, "int8", "bfloat16", 2),
    ("int8", 100, 24, 100, None, "bfloat16", 64),
    ("nf4", 256, 128, 64, None, "bfloat16", 2),
    ("fp4", 256, 128, 16, None, "bfloat16", 2),
    ("fp4", 256, 128, 32, "int8", "bfloat16", 2),
    ("codebook3", 256, 40, 32, None, "bfloat16", 8),
]


@pytest.mark.parametrize(("fmt", "k", "n", "group", "act", "dtype", "m"), CASES)
def test_product_is_within_the_bound_of_float64(fmt, k, n, group, act, dtype, m):
    p = problem(fmt, k, n, group, act, dtype)
    x, words, *rest = operands(p, m)
    prepared = kernels_pallas.prepare(words, p, "mosaic_tpu")
    got = kernels_pallas.matmul(x, prepared, *rest, problem=p, backend="mosaic_tpu", interpret=True)
    assert_close(got, x, words, *rest, p)


def test_tiles_of_every_kind_give_the_same_result_and_canonical_words_do_too():
    """Several tiles in M, N (one ragged) and K; groups within a tile and across tiles."""
    p = problem("int4", 1024, 160, 512)
    x, words, scale, _ = operands(p, m=40)
    for config in (TpuConfig(bm=32, bk=256, bn=128), TpuConfig(bm=64, bk=1024, bn=160)):
        got = kernels_pallas.matmul(
            x, words, scale, problem=p, backend="mosaic_tpu", interpret=True, config=config
        )
        assert_close(got, x, words, scale, None, p)


@pytest.mark.parametrize("fmt", ["binary", "ternary", "int3", "uint4", "nf4"])
def test_restore_undoes_prepare(fmt):
    p = problem(fmt, 96, 8, 96)
    _, words, *_ = operands(p, m=1)
    prepared = kernels_pallas.prepare(words, p, "mosaic_tpu")
    restored = kernels_pallas.restore(prepared, p, "mosaic_tpu")
    jax.tree.map(np.testing.assert_array_equal, restored, words)


@pytest.mark.parametrize("fmt", ["binary", "int2_half", "ternary"])
def test_words_prepared_without_activations_serve_int8(fmt):
    """A library prepares words once, when it does not know yet what they will be multiplied by."""
    p = problem(fmt, 256, 128, 128)
    q = problem(fmt, 256, 128, 128, "int8")
    x, words, *rest = operands(q, m=2)
    prepared = kernels_pallas.prepare(words, p, "mosaic_tpu")
    got = kernels_pallas.matmul(x, prepared, *rest, problem=q, backend="mosaic_tpu", interpret=True)
    assert_close(got, x, words, *rest, q)


@pytest.mark.parametrize("act", [None, "int8"])
def test_what_is_not_finite_reaches_its_row_and_no_other(act):
    p = problem("int4", 256, 128, 256, act)
    x, words, scale, _ = operands(p, m=3)
    x = x.at[0, 5].set(jnp.inf).at[2, 7].set(jnp.nan)
    got = kernels_pallas.matmul(x, words, scale, problem=p, backend="mosaic_tpu", interpret=True)
    want, _ = reference.matmul64(x, words, scale, None, p)
    np.testing.assert_array_equal(np.isnan(got), np.isnan(want))
    np.testing.assert_array_equal(np.isinf(got), np.isinf(want))
    assert np.all(np.isfinite(np.asarray(got[1], np.float32)))


def test_one_scale_may_serve_the_whole_kernel():
    p = problem("int4", 256, 128, 128)
    x, words, scale, _ = operands(p, m=1)
    part = scale[:1, :1].astype(jnp.bfloat16)
    got = kernels_pallas.matmul(x, words, part, problem=p, backend="mosaic_tpu", interpret=True)
    assert_close(got, x, words, np.asarray(part, np.float32), None, p)


def test_an_empty_batch_gives_an_empty_result():
    p = problem("int4", 256, 128, 128)
    _, words, scale, _ = operands(p, m=1)
    x = jnp.zeros((0, 256), jnp.bfloat16)
    got = kernels_pallas.matmul(x, words, scale, problem=p, backend="mosaic_tpu")
    assert got.shape == (0, 128)
    assert got.dtype == jnp.bfloat16


REFUSED = [
    (problem("int4", 192, 8, 96), "groups of 96"),
    (problem("int4", 64, 8, 8), "below the 16 rows"),
    (problem("nf4", 64, 8, 64, "int8"), "not integers"),
    (problem("nf4", 64, 8, 64, "fp8"), "not exact in float8"),
    (problem("int8", 64, 8, 64, "fp8"), "not exact in float8"),
    (Problem(bits=4, levels=Affine(0, 0.3), k=64, n=8, group=64), "power of two"),
]


@pytest.mark.parametrize(("p", "reason"), REFUSED)
def test_what_is_not_computed_is_refused_with_the_reason(p, reason):
    assert reason in (kernels_pallas.supported(p, "mosaic_tpu") or "")
    _, words, *rest = operands(problem("int4", p.k, p.n, p.group), m=1)
    with pytest.raises(NotImplementedError, match=reason):
        kernels_pallas.matmul(
            jnp.zeros((1, p.k), p.x_dtype), words, *rest, problem=p, backend="mosaic_tpu"
        )


def test_wrong_arrays_are_errors_that_name_the_right_ones():
    p = problem("uint4", 64, 8, 32)
    x, words, scale, zero_point = operands(p, m=2)
    call = {"problem": p, "backend": "mosaic_tpu"}
    with pytest.raises(ValueError, match=r"x is float32\[2, 64\]; the problem has bfloat16"):
        kernels_pallas.matmul(x.astype(jnp.float32), words, scale, zero_point, **call)
    with pytest.raises(ValueError, match="zero_point is None"):
        kernels_pallas.matmul(x, words, scale, None, **call)
    with pytest.raises(ValueError, match=r"scale has shape \(3, 8\); it takes \(2 or 1, 8 or 1\)"):
        kernels_pallas.matmul(x, words, jnp.ones((3, 8)), zero_point, **call)
    with pytest.raises(ValueError, match=r"plane of 4 bits has shape \(7, 8\)"):
        kernels_pallas.prepare((words[0][:7],), p, "mosaic_tpu")
    with pytest.raises(ValueError, match="unknown backend 'triton'"):
        kernels_pallas.supported(p, "triton")


def test_heuristic_tiles_divide_what_they_have_to():
    for k, group, m in itertools.product((32, 4096, 11008, 14336), (32, 128, 0), (1, 100, 4096)):
        p = problem("int3", k, 4096, group if group and k % group == 0 else k)
        config = heuristic(p, m)
        planes = tuple(jax.ShapeDtypeStruct(p.plane_shape(w), jnp.int32) for w in p.widths)
        prepared = jax.eval_shape(lambda planes, p=p: prepare(planes, p), planes)
        assert prepared.planes[0].shape[0] * 16 % config.bk == 0, (p, config)
        assert p.groups == 1 or config.bk % p.group == 0 or p.group % config.bk == 0, (p, config)
