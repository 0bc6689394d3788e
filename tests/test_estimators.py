import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lowbit_jax import formats, testing
from lowbit_jax.estimators import lsq, quantized_gradient, scaled_gradient, ste, surrogate

pytestmark = pytest.mark.usefixtures("strict_dtypes")


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_the_straight_through_value_is_exact_and_its_gradient_that_of_x(dtype):
    x = jnp.asarray(testing.awkward_array((64, 8), 0), dtype)
    x_hat = jnp.asarray(testing.awkward_array((64, 8), 1), dtype)
    value, vjp = jax.vjp(ste, x, x_hat)
    testing.assert_same_bits(value, x_hat)
    # The usual spelling is not exact: this is why the estimator exists.
    assert (np.asarray(x + (x_hat - x)) != np.asarray(x_hat)).any()
    g = jnp.asarray(testing.awkward_array((64, 8), 2), dtype)
    dx, dx_hat = vjp(g)
    testing.assert_same_bits(dx, g)
    assert not np.asarray(dx_hat, np.float32).any()


@pytest.mark.parametrize("fmt", [formats.TERNARY, formats.INT4, formats.INT2_HALF], ids=str)
@pytest.mark.parametrize("shape", [(1, 4), (1, 1), (16, 1)])
def test_the_gradient_of_a_shared_scale_is_the_sum_over_those_who_share_it(fmt, shape):
    x, g = (jnp.asarray(np.random.default_rng(i).normal(size=(16, 4)), jnp.float32) for i in (0, 1))
    scale = jnp.full(shape, 0.3, jnp.float32)
    _, vjp = jax.vjp(lambda s: lsq(x, s, fmt), scale)
    each = jax.vjp(lambda s: lsq(x, s, fmt), jnp.full((16, 4), 0.3, jnp.float32))[1](g)[0]
    axes = tuple(axis for axis, n in enumerate(shape) if n == 1)
    # Two sums of 64 terms, in any order.
    tolerance = 64 * 2.0**-23 * np.abs(np.asarray(each)).sum()
    np.testing.assert_allclose(vjp(g)[0], np.asarray(each).sum(axes, keepdims=True), atol=tolerance)


def test_lsq_gradients_are_the_same_under_jit_and_vmap():
    x = jnp.asarray(testing.awkward_array((2, 16, 4), 3))
    scale = jnp.full((2, 1, 4), 0.5, jnp.float32)

    def gradients(x, scale):
        return jax.grad(lambda x, s: jnp.sum(lsq(x, s, formats.INT4)), (0, 1))(x, scale)

    dx, ds = jax.vmap(gradients)(x, scale)
    for i in range(2):
        one_dx, one_ds = jax.jit(gradients)(x[i], scale[i])
        testing.assert_same_bits(dx[i], one_dx)
        # Sums of 16 terms of at most 8.
        np.testing.assert_allclose(ds[i], one_ds, atol=16 * 8 * 16 * 2.0**-23)


def test_scaled_gradient_is_the_identity_with_a_scaled_gradient():
    x = jnp.float32([1.0, -2.0])
    value, vjp = jax.vjp(lambda x: scaled_gradient(x, 0.25), x)
    np.testing.assert_array_equal(value, x)
    np.testing.assert_array_equal(vjp(jnp.float32([4.0, 8.0]))[0], [1.0, 2.0])


def test_surrogate_has_the_slopes_that_it_is_told_summed_where_an_operand_is_shared():
    x_hat, g = jnp.float32([[1.0, -1.0], [3.0, 4.0]]), jnp.float32([[1.0, 2.0], [4.0, 8.0]])
    operands = {"x": jnp.zeros((2, 2), jnp.float32), "s": jnp.zeros((1, 2), jnp.float32)}
    slopes = {"x": jnp.float32([[0.0, 1.0], [0.5, 2.0]]), "s": jnp.float32([[1.0, 1.0], [2.0, 0]])}
    value, vjp = jax.vjp(lambda o: surrogate(x_hat, o, slopes), operands)
    testing.assert_same_bits(value, x_hat)
    (got,) = vjp(g)
    assert got["x"].tolist() == [[0.0, 2.0], [2.0, 16.0]]
    assert got["s"].tolist() == [[9.0, 2.0]]


@pytest.mark.parametrize("bits", [1, 2, 4])
def test_quantized_gradients_are_unbiased_and_on_the_grid_of_dorefa(bits):
    g = np.float32([[1.0, -0.3, 0.05, 0.0], [0.01, 0.02, -0.04, 0.031]])
    x = jnp.zeros_like(g)
    samples = 4096

    def one(key):
        return jax.vjp(lambda x: quantized_gradient(x, key, bits), x)[1](jnp.asarray(g))[0]

    got = np.asarray(jax.vmap(one)(jax.random.split(jax.random.key(0), samples)), np.float64)
    largest, steps = np.abs(g).max(1, keepdims=True), 2**bits - 1  # Eq. 12, per row
    levels = (got / (2 * largest) + 0.5) * steps
    np.testing.assert_allclose(levels, np.round(levels), atol=1e-4)
    # A level is one of two neighbours: its variance is at most 1/4, and 5 deviations of the mean.
    tolerance = 2 * largest / steps * 0.5 / np.sqrt(samples) * 5
    assert (np.abs(got.mean(0) - g) <= tolerance + 1e-6).all()


def test_quantized_gradients_keep_value_dtype_and_zeros():
    x, key = jnp.ones((2, 3), jnp.bfloat16), jax.random.key(1)
    value, vjp = jax.vjp(lambda x: quantized_gradient(x, key, 8), x)
    testing.assert_same_bits(value, x)
    (gradient,) = vjp(jnp.zeros_like(x))
    assert gradient.dtype == jnp.bfloat16
    assert (np.abs(np.asarray(gradient, np.float32)) < 1e-29).all()
    with pytest.raises(ValueError, match="bits=0"):
        quantized_gradient(x, key, 0)
