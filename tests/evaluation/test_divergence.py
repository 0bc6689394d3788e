import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from lowbit_jax.evaluation.divergence import check_vocabulary, divergences, increase_se


class Bigram(nnx.Module):
    """The logits of the next token are a row of a table."""

    def __init__(self, table):
        self.table = nnx.Param(table)

    def __call__(self, tokens):
        return self.table[...][tokens]


def bigram(seed):
    return Bigram(jax.random.normal(jax.random.key(seed), (5, 5)))


@pytest.fixture
def batch():
    tokens = np.array([[0, 1, 2, 3], [4, 4, 0, 0]], np.int32)
    return tokens, np.array([[True, True, True], [True, False, False]])


def test_loss_and_divergence_are_those_of_the_definition(batch):
    first, second = bigram(0), bigram(1)
    found = divergences({"float": first, "other": second}, [batch])
    p, q = (np.asarray(m.table[...], np.float64) for m in (first, second))
    log_p, log_q = (x - np.log(np.exp(x).sum(-1, keepdims=True)) for x in (p, q))
    pairs = [(0, 1), (1, 2), (2, 3), (4, 4)]  # (seen, next) where the mask is true
    kl = np.mean([np.sum(np.exp(log_p[i]) * (log_p[i] - log_q[i])) for i, _ in pairs])
    for name, logs in (("float", log_p), ("other", log_q)):
        nll = -np.mean([logs[i, j] for i, j in pairs])
        # Four float32 terms of magnitude one.
        assert found[name].nll == pytest.approx(nll, abs=1e-6)
        assert found[name].ppl == pytest.approx(np.exp(nll), rel=1e-6)
        assert found[name].tokens == 4
    assert found["other"].kl == pytest.approx(kl, abs=1e-6)
    assert found["float"].kl == 0


def test_what_is_masked_has_no_influence_and_batches_add_up(batch):
    tokens, mask = batch
    models = {"a": bigram(0), "b": bigram(1)}
    other = tokens.copy()
    other[1, 2:] = 3
    whole = divergences(models, [batch])
    assert divergences(models, [(other, mask)]) == whole
    split = divergences(models, [(tokens[i : i + 1], mask[i : i + 1]) for i in range(2)])
    # The same four terms, summed in another order.
    assert split["b"].nll == pytest.approx(whole["b"].nll, rel=1e-6)
    assert split["b"].kl == pytest.approx(whole["b"].kl, rel=1e-6)


def test_wrong_text_and_wrong_models_are_named(batch):
    tokens, mask = batch
    with pytest.raises(ValueError, match="no token to predict"):
        divergences({"a": bigram(0)}, [(tokens, np.zeros_like(mask))])
    with pytest.raises(ValueError, match=r"token 7 is outside .* \[0, 5\)"):
        divergences({"a": bigram(0)}, [(tokens + 3, mask)])
    with pytest.raises(ValueError, match="calibration: token -1"):
        check_vocabulary(np.array([0, -1]), 5, "calibration")
    broken = Bigram(jnp.full((5, 5), jnp.nan))
    with pytest.raises(FloatingPointError, match=r"broken: its logits are not finite .* batch 0"):
        divergences({"a": bigram(0), "broken": broken}, [batch])


def test_the_error_of_an_increase_is_that_of_paired_rows():
    rng = np.random.default_rng(0)
    first, noise = rng.normal(50, 20, 40), rng.normal(1, 0.1, 40)
    # Rows of one length: the standard error of a mean, whatever the rows have in common.
    expected = np.std(noise, ddof=1) / np.sqrt(40) / 16
    assert increase_se(first + noise, first, [16] * 40) == pytest.approx(expected, rel=1e-9)
    # An increase in proportion to the length of a row leaves no doubt about the mean.
    counts = rng.integers(1, 30, 40)
    assert increase_se(first + 0.25 * counts, first, counts) == pytest.approx(0, abs=1e-12)
    # Rows that only fill a batch count for nothing.
    filled = increase_se([*(first + noise), 0.0], [*first, 0.0], [16] * 40 + [0])
    assert filled == pytest.approx(expected, rel=1e-9)
    assert np.isnan(increase_se([1.0], [2.0], [3]))


def test_rows_of_unequal_length_spread_as_when_drawn_anew():
    rng = np.random.default_rng(1)
    counts = rng.integers(1, 200, 400)
    increase = counts * rng.normal(0.1, 0.05, 400) + rng.normal(0, 1, 400)
    draws = rng.integers(0, 400, (4000, 400))
    bootstrap = np.std(increase[draws].sum(1) / counts[draws].sum(1))
    # 4,000 draws know a deviation to 1 / sqrt(8000); both estimates are biased by O(1 / 400).
    assert increase_se(increase, np.zeros(400), counts) == pytest.approx(bootstrap, rel=0.05)
