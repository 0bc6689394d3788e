"""Learned ranges of activations start from calibration, and are left alone while they train."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

import lowbit_jax as lb
from configs import qat_llmqat
from lowbit_jax.models import MLP, Decoder, DecoderConfig, MLPConfig
from lowbit_jax.training.calibration import Calibration
from lowbit_jax.training.step import split


def _model(preset):
    model = MLP(MLPConfig(16, (16,), 4), rngs=nnx.Rngs(0))
    return lb.quantize_model(model, lb.Recipe(lb.Rule("layers/0", preset)))


@pytest.mark.parametrize("preset", ["w4a4_lsqplus", "w2a2_n2uq"])
def test_calibration_starts_learned_ranges_and_leaves_kernels_alone(preset):
    model = _model(preset)
    x = jnp.abs(jax.random.normal(jax.random.key(1), (8, 16), jnp.float32))
    layer = model.layers[0]
    kernel = np.asarray(layer.kernel[...])
    assert np.isnan(np.asarray(model(x))).all(), "nothing runs on a range that nobody measured"
    with pytest.raises(ValueError, match="values are NaN"):
        lb.pack_model(model)
    lb.calibrate_model(model, [x, 2 * x])
    top = float(layer.input_scale[...].reshape(())) * layer.scheme.input.spec.format.max
    np.testing.assert_allclose(top, 2 * float(x.max()), rtol=1e-5)
    np.testing.assert_array_equal(layer.kernel[...], kernel)
    assert isinstance(layer.input_scale, nnx.Param)
    gradients = nnx.grad(lambda model: jnp.sum(model(x) ** 2))(model)
    assert float(jnp.abs(gradients["layers"][0]["input_scale"][...]).max()) > 0
    before = np.asarray(layer.input_scale[...])
    lb.calibrate_model(model, [5 * x], start=False)
    np.testing.assert_array_equal(layer.input_scale[...], before)


def test_training_starts_them_before_its_first_step_only(toy):
    model = lb.quantize_model(toy(), "w4a4_lsqplus")
    graphdef, state = split(model, optax.sgd(0.1))
    calibration = Calibration(graphdef, state, every=3)
    assert calibration.due(0)
    windows = jnp.arange(18, dtype=jnp.int32).reshape(2, 9) % 16
    started = calibration(state, windows, start=True)
    for leaf in jax.tree.leaves(started.params):
        assert bool(jnp.isfinite(leaf).all())
    again = calibration(started, windows[:, ::-1], start=False)
    for a, b in zip(jax.tree.leaves(again.params), jax.tree.leaves(started.params), strict=True):
        np.testing.assert_array_equal(a, b)


def test_keys_and_values_are_rounded_while_training():
    recipe = lb.Recipe.from_string(qat_llmqat.RECIPE)
    sizes = DecoderConfig(vocab=16, dim=32, layers=1, heads=2, kv_heads=2, ffn_dim=32, max_length=8)
    model = lb.quantize_model(Decoder(sizes, rngs=nnx.Rngs(0)), recipe)
    x = jax.random.normal(jax.random.key(0), (2, 5, model.config.dim), jnp.float32)
    attention = model.layers[0].attention
    for layer in (attention.key, attention.value):
        y = np.asarray(layer(x))
        largest = np.abs(y).max(-1, keepdims=True)
        np.testing.assert_allclose(y * 7 / largest, np.round(y * 7 / largest), atol=1e-4)
        assert layer.scheme.output == lb.presets["w4a8_kv4"].output
    y = np.asarray(attention.query(x))
    assert np.abs(y * 7 / np.abs(y).max() - np.round(y * 7 / np.abs(y).max())).max() > 0.1
    # The gradient passes: key kernels learn.
    tokens = jnp.arange(10, dtype=jnp.int32).reshape(2, 5)
    gradients = nnx.grad(lambda model: jnp.sum(model(tokens) ** 2))(model)
    assert float(jnp.abs(gradients["layers"][0]["attention"]["key"]["kernel"][...]).max()) > 0
