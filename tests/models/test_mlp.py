"""The MLP is its formula."""

import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from lowbit_jax.models import MLP, MLPConfig


def test_output_is_the_formula(draw_model):
    model = draw_model(lambda: MLP(MLPConfig(3, (8, 4), 2), rngs=nnx.Rngs(0)))
    x = jnp.asarray(np.random.default_rng(0).normal(size=(5, 3)), jnp.float32)
    want = np.asarray(x, np.float64)
    for layer in model.layers:
        want = np.maximum(want @ np.float64(layer.kernel[...]) + np.float64(layer.bias[...]), 0)
    want = want @ np.float64(model.head.kernel[...]) + np.float64(model.head.bias[...])
    # Three products of at most 8 terms and a bias.
    atol = 3 * 9 * np.finfo(np.float32).eps * np.max(np.abs(want))
    np.testing.assert_allclose(model(x), want, rtol=0, atol=atol)


def test_norms_stand_behind_every_layer_and_before_the_activation(draw_model):
    config = MLPConfig(3, (8,), 2, norm=True, activation="hard_tanh")
    model = draw_model(lambda: MLP(config, rngs=nnx.Rngs(0)))
    model.eval()
    x = jnp.asarray(np.random.default_rng(0).normal(size=(5, 3)), jnp.float32)

    def normed(layer, norm, x):
        assert layer.bias is None
        x = x @ np.float64(layer.kernel[...]) - np.float64(norm.mean[...])
        x = x / np.sqrt(np.float64(norm.var[...]) + 1e-5)
        return x * np.float64(norm.scale[...]) + np.float64(norm.bias[...])

    want = np.clip(normed(model.layers[0], model.norms[0], np.float64(x)), -1, 1)
    want = normed(model.head, model.head_norm, want)
    # Two products of at most 8 terms, each with four roundings of its norm.
    atol = 2 * 12 * np.finfo(np.float32).eps * np.max(np.abs(want))
    np.testing.assert_allclose(nnx.jit(lambda m, x: m(x))(model, x), want, rtol=0, atol=atol)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"norm": 1}, r"norm=1 must be True or False"),
        ({"activation": "elu"}, r"'elu' is not known"),
    ],
)
def test_what_cannot_be_built_is_named(fields, message):
    with pytest.raises(ValueError, match=message):
        MLPConfig(3, (4,), 2, **fields)


def test_without_hidden_layers_it_is_linear():
    model = nnx.eval_shape(lambda: MLP(MLPConfig(3, (), 2), rngs=nnx.Rngs(0)))
    paths = {"/".join(map(str, path)) for path, _ in nnx.to_flat_state(nnx.state(model))}
    assert paths == {"head/kernel", "head/bias"}
