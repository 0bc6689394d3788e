"""The README's table of support is what the backends say, and what they say is true."""

import functools
from pathlib import Path

import jax
import numpy as np
import pytest

import lowbit_jax as lb
from lowbit_jax.reporting.support import ACTS, BACKENDS, KINDS, K, meta, support_table
from lowbit_jax.testing import dot_tolerance

pytestmark = pytest.mark.usefixtures("cpu_kernels")
README = Path(__file__).parents[2] / "README.md"


def test_the_readme_has_the_table():
    assert support_table() in README.read_text()


@functools.cache
def operands(name):
    rng = np.random.default_rng(0)
    x, w = rng.normal(size=(3, K)).astype(np.float32), rng.normal(size=(K, 32)).astype(np.float32)
    return x, jax.jit(functools.partial(lb.quantize, spec=KINDS[name]))(w)


@pytest.mark.parametrize("name", KINDS)
def test_a_cell_of_the_cpu_is_right_or_refused(name):
    x, q = operands(name)
    w = np.asarray(q.dequantize(), np.float64)
    for act in ACTS:
        if BACKENDS["CPU"].why_not(meta(KINDS[name]), act) is not None:
            with pytest.raises(NotImplementedError):
                lb.matmul(x, q, act=act, implementation="cpu")
            continue
        scale = np.abs(x).max(axis=1, keepdims=True) * np.float32(1 / 127)
        x_hat = np.round(x * (np.float32(1) / scale)) * scale if act else x
        y = np.asarray(lb.matmul(x, q, act=act, implementation="cpu"))
        np.testing.assert_allclose(y, x_hat.astype(np.float64) @ w, atol=dot_tolerance(x, w))


@pytest.mark.parametrize("name", ["int4, groups of 32", "NVFP4"])
def test_a_cell_of_the_tpu_is_right(name):
    # The others are tested beside the kernels.
    x, q = operands(name)
    y = np.asarray(lb.matmul(x, q, implementation="interpret"))
    w = np.asarray(q.dequantize(), np.float64)
    np.testing.assert_allclose(y, x.astype(np.float64) @ w, atol=dot_tolerance(x, w))
