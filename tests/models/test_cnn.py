"""The CNN's norms follow the mode it is in."""

import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from lowbit_jax.models import CNN, CNNConfig

IMAGES = jnp.asarray(np.random.default_rng(0).normal(1, 3, (4, 6, 6, 2)), jnp.float32)


CONFIG = CNNConfig(in_channels=2, channels=(4, 8), out_features=3)

forward = nnx.jit(lambda model, images: model(images))


@pytest.fixture(scope="module")
def model(draw_model) -> CNN:
    return draw_model(lambda: CNN(CONFIG, rngs=nnx.Rngs(0)))


def test_shapes_and_paths():
    model = nnx.eval_shape(lambda: CNN(CONFIG, rngs=nnx.Rngs(0)))
    assert nnx.eval_shape(lambda model: model(IMAGES), model).shape == (4, 3)
    kernels = {
        "/".join(map(str, path)): p.shape
        for path, p in nnx.to_flat_state(nnx.state(model, nnx.Param))
        if path[-1] == "kernel"
    }
    assert kernels == {
        "layers/0/conv/kernel": (3, 3, 2, 4),
        "layers/1/conv/kernel": (3, 3, 4, 8),
        "head/kernel": (8, 3),
    }


def test_running_statistics_move_in_training_and_alone_decide_in_evaluation(model):
    def statistics():
        return np.array(model.layers[0].norm.mean[...])

    start = statistics()
    model.train()
    trained = forward(model, IMAGES)
    moved = statistics()
    assert np.all(moved != start)

    model.eval()
    want = forward(model, IMAGES)
    alone = np.concatenate([forward(model, IMAGES[i : i + 1]) for i in range(4)])
    np.testing.assert_array_equal(statistics(), moved)
    scale = float(np.max(np.abs(want)))
    # Products of 18 and 36 terms, a mean of 4 and a product of 8, in another order.
    atol = (18 + 36 + 4 + 8) * np.finfo(np.float32).eps * scale
    np.testing.assert_allclose(alone, want, rtol=0, atol=atol)
    assert np.max(np.abs(trained - want)) > 1e-2 * scale
