"""The MLP is its formula."""

import jax.numpy as jnp
import numpy as np
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


def test_without_hidden_layers_it_is_linear():
    model = nnx.eval_shape(lambda: MLP(MLPConfig(3, (), 2), rngs=nnx.Rngs(0)))
    paths = {"/".join(map(str, path)) for path, _ in nnx.to_flat_state(nnx.state(model))}
    assert paths == {"head/kernel", "head/bias"}
