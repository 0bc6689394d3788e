"""LeNet is its formula, whichever way its convolutions are computed."""

import numpy as np
import pytest
from flax import nnx

from lowbit_jax.models import LeNet, LeNetConfig

EPS = np.finfo(np.float32).eps
TINY = LeNetConfig(size=9, in_channels=2, channels=(3,), hidden=5, out_features=4, kernel_size=2)


def reference(model: LeNet, images: np.ndarray) -> np.ndarray:
    """The forward pass of one stage in float64, pixel by pixel."""
    p = {
        "/".join(map(str, path)): np.float64(value[...])
        for path, value in nnx.to_flat_state(nnx.state(model))
    }

    def norm(x, name):
        x = (x - p[f"{name}/mean"]) / np.sqrt(p[f"{name}/var"] + 1e-5)
        return x * p[f"{name}/scale"] + p[f"{name}/bias"]

    kernel = p["layers/0/conv/kernel"]
    x = np.zeros((len(images), 4, 4, 3))
    for r in range(4):
        for c in range(4):
            four = [
                np.einsum("bhwi,hwio->bo", images[:, i : i + 2, j : j + 2], kernel)
                for i in (2 * r, 2 * r + 1)
                for j in (2 * c, 2 * c + 1)
            ]
            x[:, r, c] = np.max(four, axis=0)
    x = np.maximum(norm(x, "layers/0/norm"), 0).reshape(len(images), -1)
    x = np.maximum(norm(x @ p["hidden/kernel"], "hidden_norm"), 0)
    return x @ p["head/kernel"] + p["head/bias"]


def test_scores_are_the_formula(draw_model):
    # Behind the convolution 8 x 8 pixels are left, behind the maxima 4 x 4.
    model = draw_model(lambda: LeNet(TINY, rngs=nnx.Rngs(0)))
    model.eval()
    images = np.float32(np.random.default_rng(0).normal(size=(2, 9, 9, 2)))
    want = reference(model, images)
    # Products of 8, 48 and 5 terms one after the other, each with a norm or a bias.
    atol = (8 + 48 + 5 + 3) * EPS * np.max(np.abs(want))
    np.testing.assert_allclose(nnx.jit(lambda m, x: m(x))(model, images), want, rtol=0, atol=atol)


def test_the_default_is_the_papers():
    model = nnx.eval_shape(lambda: LeNet(LeNetConfig(), rngs=nnx.Rngs(0)))
    kernels = {
        "/".join(map(str, path)): p.shape
        for path, p in nnx.to_flat_state(nnx.state(model, nnx.Param))
        if path[-1] == "kernel"
    }
    assert kernels == {  # 32-C5 + MP2 + 64-C5 + MP2 + 512FC + SVM
        "layers/0/conv/kernel": (5, 5, 1, 32),
        "layers/1/conv/kernel": (5, 5, 32, 64),
        "hidden/kernel": (4 * 4 * 64, 512),
        "head/kernel": (512, 10),
    }


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"size": 12}, r"images of size=12 have no pixel left behind 2 stages"),
        ({"channels": ()}, r"channels=\(\) leaves no stage"),
        ({"hidden": 0}, r"hidden=0 must be made of integers"),
        ({"activation": "tanh"}, r"activation 'tanh' is not known. Known: \['hard_tanh', 'relu'\]"),
        ({"convolution": "fft"}, r"convolution 'fft' is not known. Known: \['patches', 'xla'\]"),
    ],
)
def test_what_cannot_be_built_is_named(fields, message):
    with pytest.raises(ValueError, match=message):
        LeNetConfig(**fields)
