"""A cache hands back what it was given, in order."""

import jax.numpy as jnp
import numpy as np
import pytest

from lowbit_jax.models import KVCache, LayerCache


def test_keys_and_values_come_back_in_order_of_position():
    key, value = np.float32(np.random.default_rng(0).normal(size=(2, 3, 6, 2, 4)))
    cache = KVCache(3, 8, 2, 4, jnp.float32)
    assert isinstance(cache, LayerCache)
    assert cache.length == 0
    for start, stop in [(0, 2), (2, 4), (4, 6)]:
        held_key, held_value, length = cache.update(
            jnp.asarray(key[:, start:stop]), jnp.asarray(value[:, start:stop])
        )
        assert length == stop == cache.length
    np.testing.assert_array_equal(np.asarray(held_key)[:, :6], key)
    np.testing.assert_array_equal(np.asarray(held_value)[:, :6], value)
    assert held_key.shape == held_value.shape == (3, 8, 2, 4)


def test_more_than_the_capacity_in_one_call_is_an_error():
    cache = KVCache(1, 4, 1, 2, jnp.float32)
    new = jnp.zeros((1, 5, 1, 2))
    with pytest.raises(ValueError, match=r"5 new positions do not fit a capacity of 4"):
        cache.update(new, new)


def test_more_than_the_capacity_over_several_calls_is_nan():
    cache = KVCache(1, 4, 1, 2, jnp.bfloat16)
    new = jnp.ones((1, 3, 1, 2), jnp.bfloat16)
    key, value, _ = cache.update(new, new)
    assert np.all(np.isfinite(np.float32(key)))
    assert key.dtype == jnp.bfloat16
    key, value, length = cache.update(new, new)
    assert length == 6
    assert np.any(np.isnan(np.float32(key)))
    assert np.any(np.isnan(np.float32(value)))
