"""Latent weights of binary layers stay within their bound; nothing else is touched."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

import lowbit_jax as lb
from lowbit_jax.optimizers import clip_latent


def test_binaryconnect_clips_after_each_update_and_only_binary_kernels(toy):
    model = lb.quantize_model(toy(), lb.Recipe.from_string("up=w1a16_bc;down=w1a16"))
    optimizer = optax.chain(optax.sgd(1.0), clip_latent(model))
    params = nnx.state(model, nnx.Param)
    keys = iter(jax.random.split(jax.random.key(0), 9))
    grads = jax.tree.map(lambda p: 3 * jax.random.normal(next(keys), p.shape), params)
    updates, _ = optimizer.update(grads, optimizer.init(params), params)
    got = optax.apply_updates(params, updates)
    for path, leaf in nnx.to_flat_state(got):
        before, g = (dict(nnx.to_flat_state(tree))[path][...] for tree in (params, grads))
        want = np.asarray(before) - np.asarray(g)
        if path == ("up", "kernel"):
            want = np.clip(want, -1, 1)
            assert np.abs(leaf[...]).max() == 1.0  # never beyond, also not by a rounding
            assert (np.abs(leaf[...]) < 1).any()
        # w + (w' - w): two roundings of numbers below 16.
        np.testing.assert_allclose(leaf[...], want, rtol=0, atol=2.0**-20)


def test_what_cannot_be_clipped_is_said(toy):
    with pytest.raises(ValueError, match=r"no layer's kernel is quantized by \['Sign'\]"):
        clip_latent(lb.quantize_model(toy(), "w4a16"))
    with pytest.raises(ValueError, match=r"bound=0\.0 must be positive"):
        clip_latent(lb.quantize_model(toy(), "w1a16_bc"), bound=0.0)
    with pytest.raises(ValueError, match="needs the parameters"):
        clip_latent(lb.quantize_model(toy(), "w1a16_bc")).update({}, optax.EmptyState())


def test_a_weight_that_starts_beyond_the_bound_is_brought_to_it():
    model = lb.quantize_model(
        nnx.Linear(2, 1, use_bias=False, rngs=nnx.Rngs(0)), lb.Recipe(lb.Rule("", "w1a16_bc"))
    )
    model.kernel[...] = jnp.asarray([[5.0], [-0.5]], jnp.float32)
    params = nnx.state(model, nnx.Param)
    zeros = jax.tree.map(jnp.zeros_like, params)
    updates, _ = clip_latent(model, bound=2.0).update(zeros, optax.EmptyState(), params)
    np.testing.assert_array_equal(
        optax.apply_updates(params, updates)["kernel"][...], [[2], [-0.5]]
    )
