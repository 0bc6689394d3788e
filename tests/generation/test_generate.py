"""Cached generation writes what the whole context would have said, token by token."""

import collections
import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from lowbit_jax.generation import generate, sample, stream_tokens
from lowbit_jax.models import Decoder, DecoderConfig

CONFIG = DecoderConfig(
    vocab=19, dim=16, layers=1, heads=4, kv_heads=2, ffn_dim=24, max_length=12, tied=True
)
PROMPT = np.array([[3, 1, 4, 1], [5, 9, 2, 6]], np.int32)
STEPS = 8
TRACES = collections.Counter()

forward = jax.jit(lambda model, tokens: model(tokens))


class Traced(Decoder):
    """Counts how often its forward pass is traced."""

    def features(self, tokens, cache=None):
        TRACES[tokens.shape] += 1
        return super().features(tokens, cache)


def make(*, stacked: bool = False, spread: float = 1.0) -> Decoder:
    """A random model; drawn by numpy, as initializers take longer to compile than the model."""
    config = dataclasses.replace(CONFIG, stacked=stacked, layers=2 if stacked else 1)
    graphdef, state = nnx.split(nnx.eval_shape(lambda: Traced(config, rngs=nnx.Rngs(0))))
    rng = np.random.default_rng(0)

    def draw(path, leaf):
        scale = 1.0 if path[-1] == "scale" else spread * rng.normal(size=leaf.shape) / 4
        return leaf.replace(np.full(leaf.shape, scale, np.float32))

    return nnx.merge(graphdef, jax.device_put(nnx.map_state(draw, state)))


@pytest.fixture(scope="module")
def model() -> Decoder:
    return make()


@pytest.fixture(scope="module")
def greedy(model) -> np.ndarray:
    return np.asarray(generate(model, PROMPT, STEPS))


@pytest.mark.parametrize("stacked", [False, True], ids=["listed", "stacked"])
def test_greedy_tokens_are_the_most_likely_of_the_uncached_model(stacked):
    model = make(stacked=stacked)
    got = np.asarray(generate(model, PROMPT, STEPS))
    assert got.shape == (2, STEPS)
    assert got.dtype == np.int32
    # One forward pass over prompt and answer says at each position what had to follow.
    whole = np.concatenate([PROMPT, got], axis=1)
    logits = np.asarray(forward(model, whole))
    at = slice(PROMPT.shape[1] - 1, -1)
    np.testing.assert_array_equal(got, np.argmax(logits[:, at], axis=-1))
    # It says something only if no two tokens are tied and the answer is not one token all along.
    first, second = np.moveaxis(np.sort(logits[:, at])[..., -2:], -1, 0)[::-1]
    assert np.min(first - second) > 1e-4
    assert len(np.unique(got)) > 2


def test_tokens_stream_as_they_come(model, greedy):
    seen = []
    got = generate(model, PROMPT, STEPS, on_token=seen.append)
    np.testing.assert_array_equal(got, greedy)
    np.testing.assert_array_equal(np.stack(seen, axis=1), greedy)
    np.testing.assert_array_equal(
        np.stack(list(stream_tokens(model, PROMPT, STEPS)), axis=1), greedy
    )


def test_each_program_is_compiled_once_for_all_models_of_a_shape(model, greedy):
    generate(model, PROMPT, STEPS)
    before = TRACES.copy()
    again = generate(make(spread=1.5), PROMPT, STEPS)
    assert before == TRACES
    assert np.any(np.asarray(again) != greedy)


def test_a_sequence_that_stopped_writes_nothing_else(model, greedy):
    stop = int(greedy[0, 2])
    first = [list(row).index(stop) if stop in row else STEPS for row in greedy]
    assert first[0] != first[1], "both rows stop at once, and the test says nothing"
    want = np.where(np.arange(STEPS)[None, :] > np.array(first)[:, None], stop, greedy)
    np.testing.assert_array_equal(generate(model, PROMPT, STEPS, stop_token=stop), want)


def test_generation_ends_when_every_sequence_has_stopped(model, greedy):
    prompt, stop = PROMPT[[0, 0]], int(greedy[0, 2])
    last = list(greedy[0]).index(stop)
    seen = []
    got = generate(model, prompt, STEPS, stop_token=stop, on_token=seen.append)
    assert len(seen) == last + 1
    want = [*greedy[0, :last], *[stop] * (STEPS - last)]
    np.testing.assert_array_equal(got, [want, want])


def test_draws_depend_on_the_key_and_come_from_the_top_k(model):
    def draw(seed, **options):
        key = jax.random.key(seed)
        return np.asarray(
            generate(model, PROMPT, STEPS, key=key, temperature=2.0, top_k=2, **options)
        )

    one = draw(0)
    np.testing.assert_array_equal(draw(0), one)
    np.testing.assert_array_equal(draw(0, on_token=lambda tokens: None), one)
    assert np.any(draw(1) != one)

    logits = np.asarray(forward(model, np.concatenate([PROMPT, one], axis=1)))
    top = np.argsort(-logits[:, PROMPT.shape[1] - 1 : -1], axis=-1)
    rank = np.argmax(top == one[:, :, None], axis=-1)
    assert set(rank.ravel().tolist()) == {0, 1}


def test_samples_follow_the_softmax_of_the_scaled_logits():
    logits, n = jnp.log(jnp.array([0.1, 0.2, 0.3, 0.4])), 4096
    rows = jnp.broadcast_to(logits[None, :], (n, 4))

    def shares(temperature, top_k):
        tokens = sample(rows, jax.random.key(0), jnp.float32(temperature), top_k)
        return np.bincount(np.asarray(tokens), minlength=4) / n

    for temperature, top_k, weight in [
        (1.0, None, np.array([1, 2, 3, 4])),
        (0.5, None, np.array([1, 4, 9, 16])),
        (1.0, 2, np.array([0, 0, 3, 4])),
    ]:
        want = weight / weight.sum()
        # Five standard errors of a share; a share of 0 must be 0.
        error = np.abs(shares(temperature, top_k) - want)
        assert np.all(error <= 5 * np.sqrt(want * (1 - want) / n)), (temperature, top_k)


@pytest.mark.parametrize(
    ("prompt", "steps", "options", "message"),
    [
        (PROMPT, 9, {}, r"4 prompt tokens \+ 9 new ones = 13 tokens.*max_length=12.*most 8 steps"),
        (np.zeros((1, 13), np.int32), 1, {}, r"13 prompt tokens.*most 0 steps"),
        (PROMPT[0], 1, {}, r"the prompt is int32\[4\]"),
        (PROMPT[:, :0], 1, {}, r"the prompt is int32\[2, 0\].*at least one token"),
        (PROMPT * 1.0, 1, {}, r"the prompt is float64\[2, 4\]; it must be integers"),
        (PROMPT + 10, 1, {}, r"prompt tokens from 11 to 19 do not fit the model's vocab=19"),
        (PROMPT, 0, {}, r"steps=0 must be at least 1"),
        (PROMPT, 1, {"temperature": -1.0}, r"temperature=-1.0"),
        (PROMPT, 1, {"temperature": float("nan")}, r"temperature=nan"),
        (PROMPT, 1, {"temperature": 0.7}, r"temperature=0.7 draws at random and needs a key"),
        (PROMPT, 1, {"top_k": 20}, r"top_k=20 must be in \[1, 19\]"),
    ],
)
@pytest.mark.parametrize("how", [generate, stream_tokens])
def test_what_cannot_be_generated_is_refused_at_once(how, prompt, steps, options, message, model):
    with pytest.raises(ValueError, match=message):
        how(model, prompt, steps, **options)
