import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import lowbit_jax as lb
from lowbit_jax.testing import assert_same_bits

quantize = jax.jit(lb.quantize, static_argnames="spec")
lookup = jax.jit(lb.ops.lookup)
dense = jax.jit(lambda q, tokens: jnp.take(q.dequantize().T, tokens, axis=0))


@functools.cache
def table(preset):
    x = np.random.default_rng(0).normal(size=(64, 10)).astype(np.float32)
    return quantize(x, lb.presets[preset].weight.spec)


@pytest.mark.parametrize("preset", ["w1_58a16", "w3a16_g32_asym", "nvfp4a16", "mxfp4a16"])
def test_a_lookup_is_a_row_of_the_dense_table(preset):
    # -1 counts from the end; 10 and -11 are outside, and NaN as they are with jnp.take.
    tokens = jnp.array([[0, 9, -1, 10], [3, -10, -11, 2**31 - 1]])
    entries = lookup(tokens, table(preset))
    assert entries.shape == (2, 4, 64)
    assert_same_bits(entries, dense(table(preset), tokens), preset)
    nan = np.isnan(np.asarray(entries)).all(axis=-1)
    np.testing.assert_array_equal(nan, [[0, 0, 0, 1], [0, 0, 1, 1]])


def test_the_dense_table_is_never_made():
    jaxpr = str(jax.make_jaxpr(lb.ops.lookup)(jnp.arange(3), table("w1_58a16")))
    assert "f32[64,10]" not in jaxpr
    assert "f32[64,3]" in jaxpr


def test_scales_that_entries_share_are_refused():
    spec = lb.QuantSpec(format=lb.INT4, granularity=lb.Block(32, 2))
    q = jax.eval_shape(lambda x: lb.quantize(x, spec), jnp.ones((64, 10)))
    with pytest.raises(NotImplementedError, match="in blocks of 32 x 2 shares scales between"):
        lb.ops.lookup(jnp.arange(3), q)
