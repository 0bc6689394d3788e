import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import lowbit_jax as lb
from lowbit_jax.testing import assert_same_bits, dot_tolerance

quantize = jax.jit(lb.quantize, static_argnames="spec")
matmul = jax.jit(lb.matmul, static_argnames=("act", "implementation", "out_dtype"))


def normal(shape, seed=0):
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


@functools.cache
def kernel(preset="w4a16_g32"):
    return quantize(normal((64, 8)), lb.presets[preset].weight.spec)


@pytest.mark.parametrize("preset", ["w4a16_g32", "w3a16_asym", "nvfp4a16"])
def test_it_is_the_product_with_the_dequantized_kernel(preset):
    x, bias = normal((2, 3, 64), 1), normal((8,), 2)
    w = np.asarray(jax.jit(lambda q: q.dequantize())(kernel(preset)), np.float64)
    y = matmul(x, kernel(preset), bias=bias)
    # One more rounding for the bias.
    atol = dot_tolerance(x, w) + np.finfo(np.float32).eps * np.abs(bias).max()
    np.testing.assert_allclose(y, x @ w + bias, rtol=1e-6, atol=atol)


def test_int8_activations_are_rounded_per_token():
    x = normal((3, 64), 1)
    scale = np.abs(x).max(axis=-1, keepdims=True) * np.float32(1 / 127)
    x_hat = np.clip(np.round(x * (np.float32(1) / scale)), -127, 127) * scale
    assert_same_bits(matmul(x, kernel(), act="int8"), matmul(x_hat, kernel()))


def test_the_result_has_the_dtype_of_x_or_the_one_asked_for():
    x = jnp.ones((64,), jnp.bfloat16)
    shapes = functools.partial(jax.eval_shape, lb.matmul)
    assert shapes(x, kernel()).dtype == jnp.bfloat16
    assert shapes(x, kernel()).shape == (8,)
    asked = functools.partial(lb.matmul, out_dtype=jnp.dtype("float32"))
    assert jax.eval_shape(asked, x, kernel()).dtype == jnp.float32


@pytest.mark.parametrize("shape", [(3, 32), (), (64, 3)])
def test_lengths_that_differ_are_refused_with_both_shapes(shape):
    with pytest.raises(ValueError, match=r"x of shape .* against a kernel of shape \(64, 8\)"):
        lb.matmul(np.ones(shape, np.float32), kernel())


def test_a_stack_is_mapped():
    stack = jax.eval_shape(
        lambda x: lb.quantize(x, lb.presets["w4a16"].weight.spec), jnp.ones((2, 64, 8))
    )
    with pytest.raises(ValueError, match=r"Map over a stack with jax\.vmap"):
        lb.matmul(jnp.ones((2, 3, 64)), stack)
    mapped = jax.eval_shape(jax.vmap(lb.matmul), jnp.ones((2, 3, 64)), stack)
    assert mapped.shape == (2, 3, 8)


def test_what_does_not_exist_is_refused_with_what_does():
    with pytest.raises(NotImplementedError, match=r"'pallas' does not exist.*\['xla'\]"):
        lb.matmul(jnp.ones((3, 64)), kernel(), implementation="pallas")
    with pytest.raises(NotImplementedError, match=r"act='int4' does not exist.*\['int8'\]"):
        lb.matmul(jnp.ones((3, 64)), kernel(), act="int4")
    x = normal((3, 64))
    assert_same_bits(matmul(x, kernel(), implementation="xla"), matmul(x, kernel()))
