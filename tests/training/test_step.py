import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from lowbit_jax.training.distill import Teacher
from lowbit_jax.training.step import make_train_step, merge, split

WINDOWS = np.random.default_rng(0).integers(0, 16, (8, 9), dtype=np.int32)
SGD = optax.sgd(0.5)


@pytest.fixture(scope="module")
def one_step(toy):
    graphdef, state = split(toy(), SGD)
    return make_train_step(graphdef, SGD)(state, jnp.asarray(WINDOWS))


def test_loss_is_that_of_the_model_before_the_step(toy, one_step):
    _, metrics = one_step
    logits = np.float64(toy()(jnp.asarray(WINDOWS[:, :-1])))
    log_p = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
    expected = -np.take_along_axis(log_p, WINDOWS[:, 1:, None].astype(int), -1).mean()
    # A float32 mean of 64 terms: at most 64 roundings.
    np.testing.assert_allclose(metrics.loss, expected, rtol=64 * np.finfo(np.float32).eps)


def test_accumulated_gradients_are_those_of_the_whole_batch(toy, one_step):
    expected, metrics = one_step
    graphdef, state = split(toy(), SGD)
    got, got_metrics = make_train_step(graphdef, SGD, accumulate=4)(state, jnp.asarray(WINDOWS))
    # Only the order of the sum over the batch's 64 tokens differs; a parameter moves by lr *
    # gradient, and no partial sum exceeds the gradient's norm.
    eps = np.finfo(np.float32).eps
    atol = 64 * eps * 0.5 * float(metrics.grad_norm)
    np.testing.assert_allclose(got_metrics.loss, metrics.loss, rtol=64 * eps)
    for a, b in zip(jax.tree.leaves(got.params), jax.tree.leaves(expected.params), strict=True):
        # Adding the update to a parameter of size up to 1 rounds once more.
        np.testing.assert_allclose(a, b, rtol=eps, atol=atol)


def test_state_is_donated(toy):
    graphdef, state = split(toy(), SGD)
    leaf = jax.tree.leaves(state.params)[0]
    make_train_step(graphdef, SGD)(state, jnp.asarray(WINDOWS))
    assert leaf.is_deleted()


def test_training_learns_what_can_be_learned(toy):
    optimizer = optax.adam(1e-2)
    counting = (np.arange(9) + np.arange(8)[:, None]) % 16
    graphdef, state = split(toy(), optimizer)
    step = make_train_step(graphdef, optimizer)
    losses = []
    for _ in range(60):
        state, metrics = step(state, jnp.asarray(counting, jnp.int32))
        losses.append(float(metrics.loss))
    # log(16) = 2.77 is what knowing nothing costs.
    assert losses[0] > 2.5
    assert losses[-1] < 1.0
    assert merge(graphdef, state)(jnp.asarray(WINDOWS[:, :-1])).shape == (8, 8, 16)


def test_a_student_that_is_its_teacher_has_no_divergence(toy, one_step):
    _, plain = one_step
    graphdef, state = split(toy(), SGD)
    teacher = Teacher.of(toy(), temperature=2.0, weight=0.5)
    _, metrics = make_train_step(graphdef, SGD, teacher=teacher)(state, jnp.asarray(WINDOWS))
    np.testing.assert_allclose(metrics.loss, 0.5 * plain.loss, rtol=1e-6)


def test_random_streams_advance_with_the_state(toy):
    graphdef, state = split(toy(dropout=0.5), optax.sgd(0.0))
    step = make_train_step(graphdef, optax.sgd(0.0))
    state, first = step(state, jnp.asarray(WINDOWS))
    _, second = step(state, jnp.asarray(WINDOWS))
    assert float(first.loss) != float(second.loss)
