"""A quantized cache holds what quantizing the same keys and values gives, in fewer bytes."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.extend.core import jaxprs_in_params

import lowbit_jax as lb
from lowbit_jax.generation import QuantizedKVCache, generate, quantized_cache
from lowbit_jax.generation.quantized_cache import SPECS
from lowbit_jax.models import AttendingCache, Decoder, DecoderConfig, KVCache, LayerCache
from lowbit_jax.models.attention import attend, visible
from lowbit_jax.testing import assert_same_bits

FORMATS = sorted(SPECS)


@jax.jit
def update(cache, key, value):
    graphdef, state = nnx.split(cache)
    cache = nnx.merge(graphdef, state)
    out = cache.update(key, value)
    return out, cache


@pytest.mark.parametrize("name", FORMATS)
def test_what_comes_back_is_every_row_rounded_in_order_of_position(name):
    key, value = np.float32(np.random.default_rng(0).normal(size=(2, 3, 6, 2, 40)))
    cache = QuantizedKVCache(3, 8, 2, 40, jnp.float32, SPECS[name])
    assert isinstance(cache, LayerCache)
    for start, stop in [(0, 3), (3, 4), (4, 6)]:
        (held_key, held_value, length), cache = update(
            cache, key[:, start:stop], value[:, start:stop]
        )
        assert length == stop == cache.length
    rounded = jax.jit(functools.partial(lb.quantize, spec=SPECS[name]))
    assert_same_bits(held_key[:, :6], rounded(key).dequantize(), "keys")
    assert_same_bits(held_value[:, :6], rounded(value).dequantize(), "values")
    assert held_key.shape == (3, 8, 2, 40)
    # Half a step of each row's own grid (e4m3 has 3 bits of mantissa), and what a scale rounded to
    # float16 moves the ends of the widest grid by: 127.5 * 2**-11 steps.
    largest = np.abs(key).max(axis=-1, keepdims=True)
    step = {"int8": largest / 127.5, "int4": largest / 7.5, "fp8": np.abs(key) / 8 + largest / 448}
    assert (np.abs(held_key[:, :6] - key) <= 0.57 * step[name]).all()


def test_bytes():
    dense = KVCache(1, 64, 2, 64, jnp.float32)
    sizes = {"float": dense.key.get_value().nbytes}
    for name in FORMATS:
        cache = QuantizedKVCache(1, 64, 2, 64, jnp.float32, SPECS[name])
        sizes[name] = cache.key.get_value().nbytes
    # A float16 scale for 64 elements: a quarter of a bit each.
    assert sizes["float"] / sizes["int8"] == 32 / 8.25
    assert sizes["float"] / sizes["fp8"] == 32 / 8.25
    assert sizes["float"] / sizes["int4"] == 32 / 4.25


def test_more_than_the_capacity():
    cache = QuantizedKVCache(1, 4, 1, 8, jnp.float32, SPECS["int8"])
    with pytest.raises(ValueError, match="5 new positions do not fit a capacity of 4"):
        cache.update(jnp.zeros((1, 5, 1, 8)), jnp.zeros((1, 5, 1, 8)))
    new = jnp.ones((1, 3, 1, 8))
    (key, _, _), cache = update(cache, new, new)
    assert np.isfinite(key).all()
    (key, value, length), cache = update(cache, new, new)
    assert length == 6
    assert np.isnan(key).all()
    assert np.isnan(value).all()


@pytest.mark.parametrize("name", FORMATS)
def test_attention_is_that_over_what_update_hands_back(name):
    query = np.float32(np.random.default_rng(1).normal(size=(2, 6, 4, 16)))
    key, value = np.float32(np.random.default_rng(2).normal(size=(2, 2, 6, 2, 16)))
    cache = QuantizedKVCache(2, 9, 2, 16, jnp.float32, SPECS[name])
    assert isinstance(cache, AttendingCache)

    @jax.jit
    def both(cache):
        cache, other = nnx.clone(cache), nnx.clone(cache)
        for old in (cache, other):
            old.update(key[:, :2], value[:, :2])
        y = cache.attend(query[:, 2:], key[:, 2:], value[:, 2:], window=3, softcap=2.0)
        keys, values, length = other.update(key[:, 2:], value[:, 2:])
        mask = visible(2 + jnp.arange(4), 9, 3)
        want = attend(query[:, 2:], keys, values, mask=mask, softcap=2.0)
        return y, want, cache.length == length

    y, want, same = both(cache)
    assert same
    # Where the scales stand changes the last bits of scores (sums of 16 products up to 4 * 4),
    # of weights by that, and of means of values up to 4.
    np.testing.assert_allclose(y, want, rtol=0, atol=4 * np.finfo(np.float32).eps * 16 * 16)


def largest_float(function, *args):
    """Elements of the largest float array in a program, at any depth."""

    def sizes(jaxpr):
        for eqn in jaxpr.eqns:
            floats = [v.aval for v in eqn.outvars if jnp.issubdtype(v.aval.dtype, jnp.floating)]
            yield from (aval.size for aval in floats if eqn.primitive.name != "pjit")
            for inner in jaxprs_in_params(eqn.params):
                yield from sizes(inner)

    return max(sizes(jax.make_jaxpr(function)(*args).jaxpr))


@pytest.mark.parametrize("name", [*FORMATS, "kivi2"])
def test_one_token_reads_the_cache_without_a_dense_copy(name):
    dense = KVCache(1, 2048, 2, 32, jnp.float32)
    cache = quantized_cache(nnx.List([dense]), name)[0]
    query, new = jnp.ones((1, 1, 4, 32)), jnp.ones((1, 1, 2, 32))

    def method(which):
        return lambda cache, *args: getattr(nnx.clone(cache), which)(*args)

    # A stretch of 256 positions, against all of them; scales are a value a head.
    assert largest_float(method("attend"), cache, query, new, new) <= 2048 * 2 * 32 / 8
    assert largest_float(method("update"), cache, new, new) >= 2048 * 2 * 32


@functools.cache
def decoder(stacked=False):
    config = DecoderConfig(
        vocab=31, dim=32, layers=2, heads=2, kv_heads=1, ffn_dim=32, max_length=32, stacked=stacked
    )
    return Decoder(config, rngs=nnx.Rngs(0))


@pytest.mark.parametrize("name", FORMATS)
def test_generation_is_what_reading_token_by_token_gives(name):
    model, prompt = decoder(), np.array([[3, 1, 4, 1, 5]])
    tokens = np.asarray(generate(model, prompt, 6, cache_format=name))[0]

    @jax.jit
    def step(token, state):
        cache = nnx.merge(graphdef, state)
        logits = model(token[None, None], cache)[0, 0]
        return jnp.argmax(logits), nnx.state(cache)

    graphdef, state = nnx.split(quantized_cache(model.init_cache(1, 11), name))
    written = []
    for token in [*prompt[0], *tokens[:-1]]:
        following, state = step(jnp.int32(token), state)
        written.append(int(following))
    assert written[4:] == tokens.tolist()


def test_stacked_layers_write_what_listed_ones_do():
    prompt = np.array([[3, 1, 4, 1, 5]])
    listed, stacked = (
        np.asarray(generate(decoder(s), prompt, 6, cache_format="int4")) for s in (False, True)
    )
    np.testing.assert_array_equal(stacked, listed)
    one = quantized_cache(decoder(False).init_cache(3, 8), "int4")[0]
    all_ = quantized_cache(decoder(True).init_cache(3, 8), "int4")
    assert all_.key.get_value().shape == (2, *one.key.get_value().shape)


def test_what_is_not_there_is_refused():
    with pytest.raises(ValueError, match=r"no cache format 'int3'. Formats: \['float', 'int8'"):
        generate(decoder(), np.array([[1]]), 2, cache_format="int3")
    with pytest.raises(NotImplementedError, match="this model has a Dict"):
        quantized_cache(nnx.Dict(), "int8")
    cache = decoder().init_cache(1, 4)
    assert quantized_cache(cache, "float") is cache
