"""OneBit: the decomposition is the singular one, the layer is Eq. 3, and packing keeps one bit."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import lowbit_jax as lb
from lowbit_jax.calibrate import sign_value
from lowbit_jax.onebit import ValueInput, one_bit_model
from lowbit_jax.quantizers import OneBit
from lowbit_jax.testing import assert_same_bits

RECIPE = lb.Recipe.from_string("up|merge=w1a16_onebit;other=w4a16")


class Net(nnx.Module):
    def __init__(self, rngs):
        self.up = nnx.Linear(32, 32, rngs=rngs)
        self.merge = nnx.LinearGeneral((4, 8), 8, axis=(-2, -1), use_bias=False, rngs=rngs)
        self.other = nnx.Linear(8, 4, rngs=rngs)

    def __call__(self, x):
        hidden = jax.nn.silu(self.up(x))
        return self.other(self.merge(hidden.reshape(*x.shape[:-1], 4, 8)))


@pytest.fixture(scope="module")
def model():
    return one_bit_model(Net(nnx.Rngs(0)), RECIPE)


def test_the_decomposition_is_that_of_the_singular_values():
    x = np.random.default_rng(0).normal(size=(24, 10)).astype(np.float32)
    g, h = sign_value(jnp.asarray(x))
    u, s, v = np.linalg.svd(np.abs(x.astype(np.float64)))
    # The iteration has converged; what is left are float32 sums of 24 products.
    tolerance = {"rtol": 24 * 2.0**-22}
    np.testing.assert_allclose(g, np.abs(u[:, 0]) * np.sqrt(s[0]), **tolerance)
    np.testing.assert_allclose(h, np.abs(v[0]) * np.sqrt(s[0]), **tolerance)
    # Proposition of the paper's section 3.3: with the signs, better than the same rank without.
    ours = np.linalg.norm(x - np.sign(x) * np.outer(g, h))
    u, s, v = np.linalg.svd(x)
    assert ours < 0.8 * np.linalg.norm(x - s[0] * np.outer(u[:, 0], v[0]))


def test_the_decomposition_of_zeros_and_of_an_outer_product():
    g, h = sign_value(jnp.zeros((3, 2)))
    assert not np.any(g)
    assert not np.any(h)
    a, b = np.float32([1, 2, 0, 4]), np.float32([3, 0.5])
    g, h = sign_value(jnp.asarray(np.outer(a, -b)))
    np.testing.assert_allclose(np.outer(g, h), np.outer(a, b), rtol=1e-6, atol=1e-6)


def test_the_layer_is_equation_3(model):
    x = np.random.default_rng(1).normal(size=(5, 32)).astype(np.float32)
    layer, w = model.up, np.asarray(Net(nnx.Rngs(0)).up.kernel[...])
    g, h = np.asarray(layer.value[...]), np.asarray(layer.linear.kernel_scale[...])[0]
    want = ((x * g) @ np.where(w >= 0, 1.0, -1.0)) * h + np.asarray(layer.linear.bias[...])
    # Sums of 32 float32 products of the order of one.
    np.testing.assert_allclose(layer(jnp.asarray(x)), want, atol=32 * 2.0**-22)


def test_gradients_of_sign_and_value_vectors():
    """y = sum_i x_i g_i sign(w_ij) h_j, its derivatives one scalar at a time."""
    layer = one_bit_model(
        nnx.List([nnx.Linear(4, 3, use_bias=False, rngs=nnx.Rngs(0))]),
        lb.Recipe(lb.Rule("0", "w1a16_onebit")),
    )[0]
    x = np.float32([0.5, -1.0, 2.0, 0.25])
    c = np.float32([1.0, -2.0, 0.5])  # d loss / d y
    got = nnx.grad(lambda m: jnp.sum(m(jnp.asarray(x)[None]) * c[None]))(layer)
    w, g = np.asarray(layer.linear.kernel[...]), np.asarray(layer.value[...])
    h = np.asarray(layer.linear.kernel_scale[...])[0]
    dw, dg, dh = np.zeros((4, 3)), np.zeros(4), np.zeros(3)
    for i in range(4):
        for j in range(3):
            sign = 1.0 if w[i, j] >= 0 else -1.0
            dg[i] += c[j] * x[i] * sign * h[j]
            dh[j] += c[j] * x[i] * g[i] * sign
            dw[i, j] = c[j] * x[i] * g[i] * h[j]  # the sign's derivative is said to be 1
    np.testing.assert_allclose(got["value"][...], dg, rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(got["linear"]["kernel_scale"][...][0], dh, rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(got["linear"]["kernel"][...], dw, rtol=1e-5, atol=1e-6)


def test_packing_keeps_one_bit_and_the_function(model):
    packed = lb.pack_model(model)
    x = jax.random.normal(jax.random.key(0), (3, 32))
    matrix = packed.up.linear.matrix
    assert matrix.bits_per_weight == 1 + 32 * 32 / matrix.size  # a sign each, a float32 a column
    assert_same_bits(matrix.dequantize(), model.up.linear.quantized_kernel())
    assert isinstance(packed.up, ValueInput)
    assert_same_bits(packed.merge.value[...], model.merge.value[...])
    want = np.asarray(model(x))
    # Float32 sums over 32 in another order, through three layers.
    np.testing.assert_allclose(packed(x), want, atol=1e-5 * max(1.0, np.abs(want).max()))
    np.testing.assert_allclose(lb.dequantize_model(packed)(x), want, atol=1e-5)


def test_it_starts_closer_to_the_float_layer_than_mean_magnitudes_do():
    net = Net(nnx.Rngs(0))
    scales = jnp.exp(jnp.linspace(-2.0, 2.0, 32)).reshape(32, 1)  # inputs of different weight
    net.up.kernel[...] = net.up.kernel[...] * scales
    one = one_bit_model(net, RECIPE).up
    mean = lb.quantize_model(net, lb.Recipe.from_string("up=w1a16_pc")).up
    w = net.up.kernel[...]
    ours = one.value[...][:, None] * one.linear.quantized_kernel()
    assert jnp.linalg.norm(ours - w) < 0.8 * jnp.linalg.norm(mean.quantized_kernel() - w)


def test_layers_that_have_no_value_vectors_are_refused():
    with pytest.raises(ValueError, match="gives no layer the quantizer OneBit"):
        one_bit_model(Net(nnx.Rngs(0)), "w1a16")
    embed = nnx.List([nnx.Embed(4, 32, rngs=nnx.Rngs(0))])
    with pytest.raises(NotImplementedError, match="0: a QEmbed"):
        one_bit_model(embed, lb.Recipe(lb.Rule("0", "w1a16_onebit")))
    whole = lb.LayerScheme(
        weight=OneBit(lb.QuantSpec(format=lb.BINARY, granularity=lb.PerTensor()))
    )
    with pytest.raises(NotImplementedError, match=r"up: a QLinear .* per tensor"):
        one_bit_model(Net(nnx.Rngs(0)), lb.Recipe(lb.Rule("up", whole)))
