"""A KIVI cache holds, and answers with, what the paper's equations give (arXiv:2402.02750)."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from lowbit_jax.generation import KiviCache, KiviSpec, generate
from lowbit_jax.models import AttendingCache, Decoder, DecoderConfig, KVCache, LayerCache
from lowbit_jax.models.attention import attend, visible

BATCH, HEADS, KV_HEADS, WIDTH, CAPACITY = 2, 4, 2, 16, 52
SPECS = {2: KiviSpec(bits=2, group=8, window=16), 4: KiviSpec(bits=4, group=8, window=16)}
EPS = np.finfo(np.float32).eps


def rounded(x, bits):
    """Eq. 1 for groups along the last axis; scale and minimum in float16, as they are stored."""
    z = np.float64(np.float16(x.min(axis=-1, keepdims=True)))
    exact = (x.max(axis=-1, keepdims=True) - x.min(axis=-1, keepdims=True)) / (2**bits - 1)
    s = np.float64(np.float16(exact))
    level = np.clip((x - z) / s, 0, 2**bits - 1)
    # float32 differs from float64 by far less than this: no code of these arrays hangs on it.
    assert np.abs(level % 1 - 0.5).min() > 1e-6
    return np.round(level) * s + z


class Paper:
    """Algorithm 1, one batch of heads [batch, positions, kv_heads, width] at a time."""

    def __init__(self, spec):
        self.spec, self.group = spec, spec.group
        empty = np.zeros((BATCH, 0, KV_HEADS, WIDTH))
        self.packed_keys = self.recent_keys = self.packed_values = self.recent_values = empty

    def key_quant(self, x):
        """Splits off l % R positions, and quantizes the others per channel in groups along l."""
        kept = x.shape[1] % self.spec.window
        old, recent = x[:, : x.shape[1] - kept], x[:, x.shape[1] - kept :]
        split = np.moveaxis(old.reshape(BATCH, -1, self.group, KV_HEADS, WIDTH), 2, -1)
        if old.size:
            old = np.moveaxis(rounded(split, self.spec.bits), -1, 2).reshape(old.shape)
        return old, recent

    def value_quant(self, x):
        """Quantizes per token in groups of channels."""
        split = x.reshape(*x.shape[:-1], WIDTH // self.group, self.group)
        return rounded(split, self.spec.bits).reshape(x.shape) if x.size else x

    def prefill(self, query, key, value):
        window = self.spec.window
        self.packed_keys, self.recent_keys = self.key_quant(key)
        old = max(value.shape[1] - window, 0)
        self.packed_values = self.value_quant(value[:, :old])
        self.recent_values = value[:, old:]
        return attention(query, key, value)

    def decode(self, query, key, value):
        window = self.spec.window
        self.recent_keys = np.concatenate([self.recent_keys, key], axis=1)
        self.recent_values = np.concatenate([self.recent_values, value], axis=1)
        if self.recent_keys.shape[1] == window:
            old, self.recent_keys = self.key_quant(self.recent_keys)
            self.packed_keys = np.concatenate([self.packed_keys, old], axis=1)
        if self.recent_values.shape[1] > window:
            old = self.value_quant(self.recent_values[:, :-window])
            self.packed_values = np.concatenate([self.packed_values, old], axis=1)
            self.recent_values = self.recent_values[:, -window:]
        return attention(query, self.keys, self.values)

    @property
    def keys(self):
        return np.concatenate([self.packed_keys, self.recent_keys], axis=1)

    @property
    def values(self):
        return np.concatenate([self.packed_values, self.recent_values], axis=1)


def attention(query, key, value):
    """Causal attention in float64; the queries are those of the last positions."""
    query, key, value = (np.moveaxis(x, 1, 2) for x in (query, key, value))
    key, value = (np.repeat(x, HEADS // KV_HEADS, axis=1) for x in (key, value))
    new, seen = query.shape[2], key.shape[2]
    scores = query @ np.swapaxes(key, 2, 3) / np.sqrt(WIDTH)
    scores[:, :, np.triu(np.ones((new, seen), bool), seen - new + 1)] = -np.inf
    weights = np.exp(scores - scores.max(axis=-1, keepdims=True))
    weights /= weights.sum(axis=-1, keepdims=True)
    return np.moveaxis(weights @ value, 2, 1)


@functools.partial(jax.jit, static_argnames=("window", "softcap"))
def step(cache, query, key, value, window=0, softcap=None):
    """What attention gives, what the cache then holds densely, and the cache."""
    cache, other = nnx.clone(cache), nnx.clone(cache)
    y = cache.attend(query, key, value, window=window, softcap=softcap)
    held = other.update(key, value)
    return y, held, cache, (*cache.packed, nnx.state(other))


def draw(seed, length):
    rng = np.random.default_rng(seed)
    query = rng.normal(size=(BATCH, length, HEADS, WIDTH))
    key, value = rng.normal(size=(2, BATCH, length, KV_HEADS, WIDTH))
    key[..., 3] += 20.0  # a channel that is large at every position
    return tuple(np.float32(x) for x in (query, key, value))


def empty(spec, capacity=CAPACITY):
    return KiviCache(BATCH, capacity, KV_HEADS, WIDTH, jnp.float32, spec)


# One token; as long as the window (16), just longer, and behind its second edge.
@pytest.mark.parametrize(("bits", "prompt"), [(2, 1), (2, 16), (2, 17), (4, 33)])
def test_every_length_is_the_papers(bits, prompt):
    spec = SPECS[bits]
    paper, cache = Paper(spec), empty(spec)
    query, key, value = draw(prompt, CAPACITY)
    wide = tuple(np.float64(x) for x in (query, key, value))
    at = slice(0, prompt)
    want = paper.prefill(*(x[:, at] for x in wide))
    while True:
        y, (keys, values, length), cache, (old_keys, old_values, other) = step(
            cache, *(x[:, at] for x in (query, key, value))
        )
        assert length == cache.length == at.stop
        # Which positions are quantized,
        assert old_keys == paper.packed_keys.shape[1]
        assert old_values == paper.packed_values.shape[1]
        # to what: code * scale is exact in float32 (4 + 11 bits), and the sum is rounded once;
        np.testing.assert_array_equal(keys[:, :length], np.float32(paper.keys))
        np.testing.assert_array_equal(values[:, :length], np.float32(paper.values))
        # and what they give: a score is a sum of 16 products up to 20 * 4 and changes a weight by
        # that factor, the result is a mean of values up to 5.
        atol = 5 * EPS * (16 * 80 / 4 + CAPACITY)
        np.testing.assert_allclose(y, want, rtol=0, atol=atol)
        if at.stop == CAPACITY:
            break
        at = slice(at.stop, at.stop + 1)
        want = paper.decode(*(x[:, at] for x in wide))
    # `attend` and `update` take positions in alike.
    jax.tree.map(np.testing.assert_array_equal, nnx.state(cache), other)


def test_several_tokens_may_continue_a_cache_and_see_each_other_in_float():
    query, key, value = draw(0, 40)
    _, (keys, values, _), cache, _ = step(
        empty(SPECS[2]), query[:, :17], key[:, :17], value[:, :17]
    )
    y, *_ = step(cache, query[:, 17:], key[:, 17:], value[:, 17:])
    held = [
        np.concatenate([x[:, :17], new[:, 17:]], 1) for x, new in ((keys, key), (values, value))
    ]
    want = attention(*(np.float64(x) for x in (query[:, 17:], *held)))
    # As above.
    np.testing.assert_allclose(y, want, rtol=0, atol=5 * EPS * (16 * 80 / 4 + 40))


def test_a_window_and_bounded_scores():
    """A token sees what `update` hands back, by the rules of `models.attention`."""
    query, key, value = draw(1, 18)
    _, _, cache, _ = step(empty(SPECS[2]), query[:, :17], key[:, :17], value[:, :17])
    last = (query[:, 17:], key[:, 17:], value[:, 17:])
    y, (keys, values, _), *_ = step(cache, *last, window=17, softcap=3.0)
    mask = visible(jnp.array([17]), CAPACITY, 17)
    want = attend(last[0], keys, values, mask=mask, softcap=3.0)
    # As above; the bound on scores only makes their errors smaller.
    np.testing.assert_allclose(y, want, rtol=0, atol=5 * EPS * (16 * 80 / 4 + 18))


def test_a_cache_shorter_than_the_window_is_a_float_cache():
    query, key, value = draw(2, 12)
    cache, dense = empty(SPECS[2], 12), KVCache(BATCH, 12, KV_HEADS, WIDTH, jnp.float32)
    assert isinstance(cache, LayerCache)
    assert isinstance(cache, AttendingCache)
    _, (keys, values, _), *_ = step(cache, query, key, value)
    dense_keys, dense_values, _ = dense.update(key, value)
    np.testing.assert_array_equal(keys, dense_keys)
    np.testing.assert_array_equal(values, dense_values)
    assert cache.key.nbytes == cache.value.nbytes == 0


def test_bytes():
    cache = KiviCache(1, 512, 2, 64, jnp.bfloat16, KiviSpec(bits=2))
    # 2 bits, and two float16 numbers for 32 elements; values have one window of room less.
    assert cache.key.nbytes * 8 == 512 * 2 * 64 * (2 + 32 / 32)
    assert cache.value.nbytes * 8 == 384 * 2 * 64 * (2 + 32 / 32)


def test_more_than_the_capacity():
    query, key, value = draw(3, 17)
    cache = empty(SPECS[2])
    with pytest.raises(ValueError, match="68 new positions do not fit a capacity of 52"):
        cache.attend(*(np.tile(x, (1, 4, 1, 1)) for x in (query, key, value)))
    for total in (17, 34, 51, 68):
        y, (_, _, length), cache, _ = step(cache, query, key, value)
        assert length == total
        assert np.isnan(y).all() if total > CAPACITY else np.isfinite(y).all()
    # Also what comes after, whatever it is.
    y, *_ = step(cache, query[:, :1], key[:, :1], value[:, :1])
    assert np.isnan(y).all()


def test_what_does_not_split_is_refused():
    with pytest.raises(ValueError, match=r"window=40 must be a multiple of group=32"):
        KiviSpec(bits=2, window=40)
    with pytest.raises(ValueError, match=r"window=8 must be a multiple .* so many codes of 2 bits"):
        KiviSpec(bits=2, group=8, window=8)
    with pytest.raises(ValueError, match="bits=3 must be 1, 2, 4 or 8"):
        KiviSpec(bits=3)
    with pytest.raises(ValueError, match=r"width 40 do not split into groups of 32 \(40 = 1"):
        KiviCache(1, 256, 2, 40, jnp.float32, KiviSpec(bits=2))


@functools.cache
def decoder(stacked):
    config = DecoderConfig(
        vocab=31, dim=32, layers=2, heads=2, kv_heads=1, ffn_dim=32, max_length=160, stacked=stacked
    )
    return Decoder(config, rngs=nnx.Rngs(0))


def test_generation_with_listed_and_stacked_layers():
    prompt = np.random.default_rng(0).integers(0, 31, (2, 130))
    tokens = [
        np.asarray(generate(decoder(s), prompt, 6, cache_format="kivi2")) for s in (False, True)
    ]
    np.testing.assert_array_equal(*tokens)
