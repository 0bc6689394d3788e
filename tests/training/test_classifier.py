"""The classifier's loop: its loss, its optimizers, and which epoch it returns."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import lowbit_jax as lb
from lowbit_jax.data.images import LabelledImages
from lowbit_jax.models import MLP, MLPConfig
from lowbit_jax.training import classifier
from lowbit_jax.training.classifier import ClassifierConfig

EPS = np.finfo(np.float32).eps
CONFIG = ClassifierConfig(
    epochs=4,
    batch=16,
    optimizer="adam",
    lr=0.1,
    final_lr=0.01,
    glorot_lr=True,
    clip=1.0,
    validation=32,
)


def made_up(count: int) -> LabelledImages:
    """Two classes, told apart by the brightness of two pixels of four."""
    rng = np.random.default_rng(0)
    labels = rng.integers(0, 2, count, np.int32)
    images = rng.integers(0, 128, (count, 2, 2, 1), np.uint8)
    images[:, 0] += np.uint8(100) * labels.astype(np.uint8)[:, None, None]
    return LabelledImages(images, labels)


def forward(model, images):
    return model(images.reshape(images.shape[0], -1))


@pytest.fixture(scope="module")
def trained():
    """(the model before, after, its history as it was told) of BinaryConnect."""
    model = MLP(MLPConfig(4, (8,), 2, norm=True), rngs=nnx.Rngs(0))
    model = lb.quantize_model(model, lb.Recipe(lb.Rule(".*", "w1a16_bc")))
    told = []
    found = classifier.train_classifier(
        model, forward, made_up(128), CONFIG, seed=0, on_epoch=told.append
    )
    return model, found, told


def test_squared_hinge_is_its_formula():
    rng = np.random.default_rng(0)
    scores = np.float32(rng.normal(size=(5, 3)))
    labels = np.int32([0, 2, 1, 1, 0])
    want = 0.0
    for row, label in zip(np.float64(scores), labels, strict=True):
        for k, score in enumerate(row):
            want += max(0.0, 1.0 - (1.0 if k == label else -1.0) * score) ** 2 / 5
    got = classifier.squared_hinge(jnp.asarray(scores), jnp.asarray(labels))
    # 15 positive terms, each of three roundings.
    np.testing.assert_allclose(got, want, rtol=18 * EPS)


def test_pixels_fill_the_interval():
    got = classifier.pixels(jnp.uint8([0, 255, 51]))
    np.testing.assert_allclose(got, [-1, 1, -0.6], rtol=0, atol=2 * EPS)


def test_binaryconnect_learns_and_its_weights_stay_clipped(trained):
    _, found, _ = trained
    losses = [epoch.loss for epoch in found.history]
    assert losses[-1] < losses[0] / 2
    kernels = [np.asarray(m.kernel[...]) for m in (found.model.layers[0], found.model.head)]
    largest = max(np.max(np.abs(kernel)) for kernel in kernels)
    # w + (clip(w + update) - w) is rounded twice; and with steps of 0.1 some weight gets there.
    assert 1 - 2 * EPS <= largest <= 1 + 2 * EPS
    assert classifier.error(found.model, forward, made_up(128)) < 10


def test_the_epoch_with_the_least_validation_error_is_returned(trained):
    _, found, told = trained
    errors = [epoch.validation_error for epoch in found.history]
    assert told == found.history
    assert found.best == 1 + int(np.argmin(errors))
    held_out = made_up(128)[96:]
    assert classifier.error(found.model, forward, held_out) == min(errors)


def test_the_argument_is_left_as_it_was(trained):
    model, found, _ = trained
    fresh = MLP(MLPConfig(4, (8,), 2, norm=True), rngs=nnx.Rngs(0))
    np.testing.assert_array_equal(model.head.kernel[...], fresh.head.kernel[...])
    np.testing.assert_array_equal(model.norms[0].mean[...], 0)
    assert np.any(found.model.norms[0].mean[...] != 0)


def test_sgd_is_momentum_with_drops_and_decay_of_kernels():
    config = ClassifierConfig(
        epochs=1, batch=1, optimizer="sgd", lr=0.5, drops=(0.5,), weight_decay=0.25
    )
    params = {"kernel": jnp.ones((1, 2)), "bias": jnp.ones(2)}
    optimizer = classifier.make_optimizer(config, nnx.Module(), steps=4)
    state, update = optimizer.init(params), jax.jit(optimizer.update)
    want, moment = dict.fromkeys(params, 1.0), dict.fromkeys(params, 0.0)
    for step in range(4):
        updates, state = update(jax.tree.map(jnp.ones_like, params), state, params)
        params = jax.tree.map(jnp.add, params, updates)
        for name, decay in (("kernel", 0.25), ("bias", 0.0)):
            moment[name] = 0.9 * moment[name] + 1 + decay * want[name]
            want[name] -= (0.5 if step < 2 else 0.05) * moment[name]
    for name in params:
        # Four steps of five roundings, of numbers below 4.
        np.testing.assert_allclose(
            params[name], np.full(params[name].shape, want[name]), atol=80 * EPS
        )


def test_rates_decay_exponentially_and_grow_with_a_layers_connections():
    config = dataclasses.replace(CONFIG, optimizer="sgd", lr=1.0, final_lr=0.25, clip=None)
    params = {"kernel": jnp.zeros((5, 5, 2, 4)), "bias": jnp.zeros(4)}
    optimizer = classifier.make_optimizer(config, nnx.Module(), steps=3)
    state, update = optimizer.init(params), jax.jit(optimizer.update)
    grads = jax.tree.map(jnp.ones_like, params)
    moment = 0.0
    for rate in (1.0, 0.5, 0.25):
        updates, state = update(grads, state, params)
        moment = 0.9 * moment + 1
        # A power, a root, products: 16 roundings are plenty.
        np.testing.assert_allclose(updates["bias"], np.full(4, -rate * moment), rtol=16 * EPS)
        glorot = np.sqrt(25 * (2 + 4) / 1.5)
        np.testing.assert_allclose(
            updates["kernel"].ravel(), np.full(200, -rate * moment * glorot), rtol=16 * EPS
        )


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"epochs": 0}, r"epochs=0"),
        ({"validation": -1}, r"validation=-1 at least 0"),
        ({"lr": 0.0}, r"learning rates \[0.0, 0.01\] must be numbers > 0"),
        ({"optimizer": "lion"}, r"optimizer='lion' is not of"),
    ],
)
def test_what_makes_no_run_is_named(fields, message):
    with pytest.raises(ValueError, match=message):
        dataclasses.replace(CONFIG, **fields)


def test_too_few_images_for_a_batch_are_an_error_with_numbers(trained):
    model = trained[0]
    with pytest.raises(ValueError, match=r"40 images without the 32 for validation fill no batch"):
        classifier.train_classifier(model, forward, made_up(40), CONFIG, seed=0)


def test_a_loss_that_is_not_finite_ends_the_run(trained, monkeypatch):
    def step(params, rest, opt, images, labels):
        return params, rest, opt, jnp.float32(np.nan)

    monkeypatch.setattr(classifier, "_make_step", lambda *arguments: step)
    with pytest.raises(FloatingPointError, match=r"epoch 1: the mean loss is nan.*than 0.1"):
        classifier.train_classifier(trained[0], forward, made_up(64), CONFIG, seed=0)
