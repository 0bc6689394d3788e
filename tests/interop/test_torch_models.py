"""The published ResNet-20 is loaded, and sees what is on the images."""

import jax
import numpy as np
import pytest

from lowbit_jax.interop import load_model
from lowbit_jax.interop.torch_pickle import read_tensors
from lowbit_jax.models import ResNetConfig, cifar_input

FILE = "resnet20-12fca82f.th"


@pytest.fixture(scope="module")
def path(assets):
    return assets / "resnet_cifar10" / FILE


@pytest.fixture(scope="module")
def loaded(path):
    return load_model(path)


def test_the_file_is_a_resnet_20(loaded, path):
    assert loaded.model.config == ResNetConfig()
    assert loaded.source == {"path": str(path), "format": "torch", "architecture": "resnet"}


def test_weights_stand_in_our_order(loaded, files, path):
    tensors, leaves = read_tensors(path), files.leaves_of(loaded.model)
    # Two stem and block layers by hand; (out, in, height, width) becomes (height, width, in, out).
    want = tensors["module.layer2.0.conv1.weight"]
    np.testing.assert_array_equal(leaves["layers/3/conv1/kernel"], want.transpose(2, 3, 1, 0))
    np.testing.assert_array_equal(leaves["norm/mean"], tensors["module.bn1.running_mean"])
    np.testing.assert_array_equal(
        leaves["layers/8/norm2/var"], tensors["module.layer3.2.bn2.running_var"]
    )
    np.testing.assert_array_equal(leaves["head/kernel"], tensors["module.linear.weight"].T)
    floats = [name for name in tensors if not name.endswith("num_batches_tracked")]
    assert len(leaves) == len(floats)


def test_it_is_sure_of_what_it_sees_and_sees_all_classes(loaded, assets):
    with np.load(assets / "cifar10_unlabelled" / "images.npz") as file:
        images = cifar_input(file["images"][:200])
    scores = jax.jit(lambda model, x: jax.nn.softmax(model(x)))(loaded.model, images)
    # 0.9976 here and 0.9938 over all 4,000 images, which it was trained on. With "SAME" padding in
    # the strided convolutions it is 0.974, with blue and red exchanged 0.957.
    assert np.mean(np.max(scores, axis=-1)) > 0.99
    histogram = np.bincount(np.argmax(scores, axis=-1), minlength=10)
    # 200 images of 10 equal classes: 20 of each, with a standard deviation of 4.2.
    assert np.all(abs(histogram - 20) < 5 * 4.3)


def test_tensors_of_something_else_are_named(save, path, monkeypatch):
    tensors = read_tensors(path)

    def refused(change, message):
        changed = change(dict(tensors))
        monkeypatch.setattr("lowbit_jax.interop.torch_models.read_tensors", lambda path: changed)
        with pytest.raises(ValueError, match=message):
            load_model(path)

    refused(lambda t: {"module.fc.weight": t["module.linear.weight"]}, r"not a CIFAR ResNet")
    refused(lambda t: t | {"module.extra": t["module.linear.bias"]}, r"no parameter .*: extra")
    refused(
        lambda t: {n: x for n, x in t.items() if n != "module.bn1.weight"},
        r"missing .*: bn1.weight",
    )
    far = {"module.layer1.4000000000.bn1.weight": tensors["module.bn1.weight"]}
    refused(lambda t: t | far, r"tensors of 4 layers, the last of them numbered 4000000000")
