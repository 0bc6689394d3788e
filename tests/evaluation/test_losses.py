"""Cross-entropy against the formula in float64, its gradient, and what a mask keeps out."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lowbit_jax.evaluation import cross_entropy, token_nll

LOGITS = np.random.default_rng(0).normal(0, 3, (2, 3, 7))
TARGETS = np.array([[0, 6, 3], [2, 2, 5]])
MASK = np.array([[True, True, False], [False, True, True]])
# Sums of 7 terms of magnitude below 16: some roundings of float32 each.
RTOL = 10 * np.finfo(np.float32).eps


def reference(logits, targets):
    """-log softmax(logits)[target], in float64."""
    p = np.exp(logits) / np.exp(logits).sum(-1, keepdims=True)
    return -np.log(np.take_along_axis(p, targets[..., None], -1)[..., 0])


def test_token_nll_is_minus_log_softmax():
    got = token_nll(jnp.asarray(LOGITS, jnp.float32), jnp.asarray(TARGETS))
    np.testing.assert_allclose(got, reference(LOGITS, TARGETS), rtol=RTOL, atol=RTOL * 16)


def test_token_nll_of_bfloat16_is_computed_in_float32():
    logits = jnp.asarray(LOGITS, jnp.bfloat16)
    got = token_nll(logits, jnp.asarray(TARGETS))
    assert got.dtype == jnp.float32
    exact = reference(np.asarray(logits, np.float64), TARGETS)
    np.testing.assert_allclose(got, exact, rtol=RTOL, atol=RTOL * 16)


def test_large_logits_do_not_overflow():
    got = token_nll(jnp.array([[1e30, 0.0, -1e30]]), jnp.array([0]))
    np.testing.assert_array_equal(got, [0.0])


@pytest.mark.parametrize("target", [-1, 7])
def test_a_target_outside_the_vocabulary_has_no_likelihood(target):
    assert jnp.isnan(token_nll(jnp.zeros((1, 7)), jnp.array([target]))).all()


def test_gradient_is_softmax_minus_one_hot():
    gradient = jax.grad(cross_entropy)(jnp.asarray(LOGITS, jnp.float32), jnp.asarray(TARGETS))
    p = np.exp(LOGITS) / np.exp(LOGITS).sum(-1, keepdims=True)
    expected = (p - np.eye(7)[TARGETS]) / TARGETS.size
    np.testing.assert_allclose(gradient, expected, rtol=0, atol=RTOL)


def test_masked_tokens_have_no_influence_even_where_they_are_nan():
    poisoned = np.where(MASK[..., None], LOGITS, np.nan)
    targets = np.where(MASK, TARGETS, 10**6)

    def loss(logits):
        return cross_entropy(logits, jnp.asarray(targets), jnp.asarray(MASK))

    value, gradient = jax.value_and_grad(loss)(jnp.asarray(poisoned, jnp.float32))
    expected = reference(LOGITS, TARGETS)[MASK].mean()
    np.testing.assert_allclose(value, expected, rtol=RTOL * 4)
    assert not np.any(np.asarray(gradient)[~MASK])
    assert np.all(np.isfinite(gradient))
    assert np.all(np.any(np.asarray(gradient)[MASK], axis=-1))
