"""ResNet computes what its paper and the published weights' code say."""

import numpy as np
import pytest
from flax import nnx

from lowbit_jax.models import ResNet, ResNetConfig, build, cifar_input, family_of

EPS = np.finfo(np.float32).eps
TINY = ResNetConfig(blocks=(1, 1), widths=(2, 6), in_channels=2, out_features=3)


def reference(model: ResNet, images: np.ndarray) -> np.ndarray:
    """The forward pass in float64, one window at a time, with zeros on all sides of an image."""
    p = {
        "/".join(map(str, path)): np.float64(value[...])
        for path, value in nnx.to_flat_state(nnx.state(model))
    }

    def conv(x, name, stride):
        x = np.pad(x, ((0, 0), (1, 1), (1, 1), (0, 0)))
        rows, columns = (range(0, n - 2, stride) for n in x.shape[1:3])
        return np.stack(
            [
                np.stack(
                    [
                        np.einsum("bhwi,hwio->bo", x[:, r : r + 3, c : c + 3], p[f"{name}/kernel"])
                        for c in columns
                    ],
                    axis=1,
                )
                for r in rows
            ],
            axis=1,
        )

    def norm(x, name):
        x = (x - p[f"{name}/mean"]) / np.sqrt(p[f"{name}/var"] + 1e-5)
        return x * p[f"{name}/scale"] + p[f"{name}/bias"]

    x = np.maximum(norm(conv(images, "conv", 1), "norm"), 0)
    for i, stride in enumerate((1, 2)):
        y = np.maximum(norm(conv(x, f"layers/{i}/conv1", stride), f"layers/{i}/norm1"), 0)
        y = norm(conv(y, f"layers/{i}/conv2", 1), f"layers/{i}/norm2")
        side = np.zeros((*y.shape[:3], (y.shape[3] - x.shape[3]) // 2))
        x = np.maximum(np.concatenate([side, x[:, ::stride, ::stride], side], axis=3) + y, 0)
    return x.mean((1, 2)) @ p["head/kernel"] + p["head/bias"]


def test_scores_are_those_of_the_paper(draw_model):
    model = draw_model(lambda: ResNet(TINY, rngs=nnx.Rngs(0)))
    model.eval()
    images = np.float32(np.random.default_rng(0).normal(size=(2, 6, 6, 2)))
    want = reference(model, images)
    # Products of up to 3 * 3 * 6 terms, six of them one after the other.
    atol = 6 * 54 * EPS * np.max(np.abs(want))
    np.testing.assert_allclose(model(images), want, rtol=0, atol=atol)


def test_the_default_is_resnet_20():
    model = nnx.eval_shape(lambda: ResNet(ResNetConfig(), rngs=nnx.Rngs(0)))
    convolutions = [path for path, _ in nnx.to_flat_state(nnx.state(model)) if path[-1] == "kernel"]
    assert len(convolutions) == 20
    sizes = [np.prod(p.shape) for _, p in nnx.to_flat_state(nnx.state(model, nnx.Param))]
    assert sum(sizes) == 269_722  # 0.27 M in table 6 of the paper


def test_the_family_is_built_from_its_configuration():
    model = nnx.eval_shape(lambda: ResNet(TINY, rngs=nnx.Rngs(0)))
    name, config = family_of(model)
    again = nnx.eval_shape(lambda: build(name, config, nnx.Rngs(0)))
    assert (name, again.config) == ("resnet", TINY)


def test_images_are_standardized_by_channel():
    images = np.uint8([[[[0, 255, 51]]]])
    want = [(0 - 0.485) / 0.229, (1 - 0.456) / 0.224, (0.2 - 0.406) / 0.225]
    np.testing.assert_allclose(cifar_input(images)[0, 0, 0], want, rtol=8 * EPS)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"blocks": (3, 3)}, r"blocks=\(3, 3\) and widths=\(16, 32, 64\)"),
        ({"blocks": (), "widths": ()}, r"at least one"),
        ({"widths": (16, 8, 64)}, r"must grow by even steps"),
        ({"widths": (16, 17, 64)}, r"must grow by even steps"),
        ({"out_features": 0}, r"out_features=0"),
    ],
)
def test_sizes_that_do_not_fit_are_named(fields, message):
    with pytest.raises(ValueError, match=message):
        ResNetConfig(**fields)
