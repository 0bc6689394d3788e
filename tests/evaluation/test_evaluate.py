"""Evaluation against a float64 reference: the right mean, in the right units, over every token."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.sharding import NamedSharding, PartitionSpec

from lowbit_jax.data import ByteTokenizer
from lowbit_jax.evaluation import Evaluation, bits_per_byte, evaluate

VOCAB = 16
TOKENS = np.random.default_rng(0).integers(0, VOCAB, 203).astype(np.uint8)
# A mean of 202 terms near ln 16, each with some float32 roundings: sums of a window of at most 16
# terms, added up exactly on the host.
RTOL = 32 * np.finfo(np.float32).eps


class Bigram(nnx.Module):
    """Logits of the next token from the last alone: what windows and batches cannot change."""

    def __init__(self, rngs):
        self.table = nnx.Embed(VOCAB, VOCAB, rngs=rngs)
        self.table.embedding[...] = self.table.embedding[...] * 8

    def __call__(self, tokens):
        return self.table(tokens)


class Recency(nnx.Module):
    """Predicts the tokens seen in its window so far: the more context, the more it knows."""

    def __call__(self, tokens):
        return jnp.log1p(jnp.cumsum(jax.nn.one_hot(tokens, VOCAB), axis=1))


@pytest.fixture(scope="module")
def bigram():
    return Bigram(nnx.Rngs(0))


def reference_nll(model, tokens):
    """The mean over all tokens but the first, in float64."""
    table = np.asarray(model.table.embedding[...], np.float64)
    logits = table[tokens[:-1]]
    return np.mean(np.log(np.exp(logits).sum(-1)) - logits[np.arange(len(logits)), tokens[1:]])


@pytest.mark.parametrize(("length", "batch"), [(8, 4), (8, 1), (16, 3), (101, 2), (500, 1)])
def test_nll_is_the_mean_over_every_token_but_the_first(bigram, length, batch):
    result = evaluate(bigram, TOKENS, length=length, batch=batch)
    expected = reference_nll(bigram, TOKENS)
    np.testing.assert_allclose(result.nll, expected, rtol=RTOL)
    np.testing.assert_allclose(result.ppl, np.exp(expected), rtol=RTOL * 4)
    assert (result.tokens, result.length, result.bits_per_byte) == (202, length, None)


def test_a_uniform_model_over_bytes_takes_eight_bits_a_byte():
    def uniform(tokens):
        return jnp.zeros((*tokens.shape, 256))

    text = np.frombuffer("Grüße, world".encode(), np.uint8)
    for byte_count in (ByteTokenizer().byte_count, len(text)):
        result = evaluate(uniform, text, length=4, batch=2, byte_count=byte_count)
        np.testing.assert_allclose(result.bits_per_byte, 8.0, rtol=RTOL)
        np.testing.assert_allclose(result.ppl, 256.0, rtol=RTOL * 8)


def test_bits_per_byte_counts_the_bytes_of_what_was_predicted(bigram):
    # Token t stands for t + 1 bytes.
    def byte_count(tokens):
        return int(np.sum(tokens.astype(int) + 1))

    result = evaluate(bigram, TOKENS, length=8, batch=4, byte_count=byte_count, max_windows=3)
    part = TOKENS[:25]
    bits = reference_nll(bigram, part) * 24 / np.log(2)
    np.testing.assert_allclose(result.bits_per_byte, bits / byte_count(part[1:]), rtol=RTOL)
    assert result.tokens == 24

    given = evaluate(bigram, TOKENS, length=8, batch=4, byte_count=406, max_windows=3)
    np.testing.assert_allclose(given.bits_per_byte, bits / (24 * 406 / 203), rtol=RTOL)
    np.testing.assert_allclose(bits_per_byte(np.log(2), 4.0), 0.25, rtol=1e-15)


def test_the_stated_context_is_what_the_model_sees():
    losses = [evaluate(Recency(), TOKENS % 3, length=n, batch=4).nll for n in (2, 8, 64)]
    assert losses == sorted(losses, reverse=True)
    assert losses[0] - losses[-1] > 0.1


def test_functions_modules_and_pytrees_agree(bigram):
    options = {"length": 8, "batch": 4}
    graph, state = nnx.split(bigram)
    results = [
        evaluate(bigram, TOKENS, **options),
        evaluate(bigram, TOKENS, apply=lambda m, t: m.table(t), **options),
        evaluate(lambda tokens: bigram(tokens), TOKENS, **options),
        evaluate(state, TOKENS, apply=lambda s, t: nnx.merge(graph, s)(t), **options),
    ]
    assert all(isinstance(result, Evaluation) and result == results[0] for result in results)


def test_a_changed_model_is_not_compiled_again():
    traces = []

    class Counting(Bigram):
        def __call__(self, tokens):
            traces.append(tokens.shape)
            return super().__call__(tokens)

    model = Counting(nnx.Rngs(1))
    before = evaluate(model, TOKENS, length=8, batch=4)
    model.table.embedding[...] = model.table.embedding[...] * 0.5
    after = evaluate(model, TOKENS, length=8, batch=4)
    np.testing.assert_allclose(after.nll, reference_nll(model, TOKENS), rtol=RTOL)
    assert before.nll != after.nll
    assert traces == [(4, 8)]


def test_eight_devices_give_the_result_of_one(bigram):
    mesh = jax.make_mesh((8,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
    sharding = NamedSharding(mesh, PartitionSpec("data"))
    one = evaluate(bigram, TOKENS, length=8, batch=8)
    eight = evaluate(bigram, TOKENS, length=8, batch=8, sharding=sharding)
    np.testing.assert_allclose(eight.nll, one.nll, rtol=RTOL)


def test_progress_counts_windows(bigram):
    calls = []
    evaluate(bigram, TOKENS, length=8, batch=10, on_batch=lambda *call: calls.append(call))
    assert calls == [(10, 26), (20, 26), (26, 26)]


def test_nan_logits_name_the_window():
    def nan_after_a_nine(tokens):
        seen = jnp.cumsum(tokens == 9, axis=1)[..., None] > 0
        return jnp.where(seen, jnp.nan, jnp.zeros((*tokens.shape, VOCAB)))

    tokens = np.zeros(100, np.uint8)
    tokens[37] = 9
    with pytest.raises(FloatingPointError, match=r"window 4 \(tokens 32 to 40\) is nan"):
        evaluate(nan_after_a_nine, tokens, length=8, batch=2)
    # The rows that only fill the last batch are no part of the text.
    with pytest.raises(FloatingPointError, match="window 4"):
        evaluate(nan_after_a_nine, tokens[:39], length=8, batch=64)


def test_a_huge_loss_is_infinite_perplexity_and_no_overflow():
    def sure_and_wrong(tokens):
        return jax.nn.one_hot(tokens, VOCAB) * 2000.0

    result = evaluate(sure_and_wrong, np.arange(10), length=4, batch=2)
    assert result.nll == 2000.0
    assert result.ppl == float("inf")


@pytest.mark.parametrize("wrong", [-1, VOCAB, 255])
def test_a_token_the_model_does_not_know_is_an_error(bigram, wrong):
    tokens = TOKENS.astype(np.int32)
    tokens[150] = wrong
    with pytest.raises(ValueError, match=rf"token {wrong} is outside .* \[0, 16\)"):
        evaluate(bigram, tokens, length=8, batch=4)


@pytest.mark.parametrize(
    ("arguments", "options", "message"),
    [
        ((lambda t: jnp.zeros((4, VOCAB)), TOKENS), {}, r"logits \[4, 16\] from tokens \[4, 8\]"),
        ((object(), TOKENS), {}, "a object cannot be called"),
        ((Recency(), TOKENS[:1]), {}, r"1 token\(s\)"),
        ((Recency(), TOKENS), {"max_windows": 0}, "max_windows is 0"),
        ((Recency(), TOKENS), {"length": 0}, r"length \(0\)"),
        ((Recency(), TOKENS[None]), {}, "flat"),
    ],
)
def test_wrong_arguments_are_errors(arguments, options, message):
    with pytest.raises(ValueError, match=message):
        evaluate(*arguments, **({"length": 8, "batch": 4} | options))
