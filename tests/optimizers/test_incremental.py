"""Incremental quantization: the largest first, frozen for good, and packed as they are."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

import lowbit_jax as lb
from lowbit_jax.optimizers import incremental, partitions
from lowbit_jax.testing import assert_same_bits

RULE = lb.Recipe(lb.Rule("", "w4a16_pow2"))
LEVELS = np.sort([0.0] + [s * 2.0**-i for i in range(7) for s in (-1, 1)])


def test_the_rule_of_the_paper_one_scalar_at_a_time():
    layer = nnx.Linear(6, 1, rngs=nnx.Rngs(0))
    w = np.float32([1.0, -0.7, 0.3, 0.09, -0.05, 0.6])
    layer.kernel[...] = jnp.asarray(w)[:, None]
    optimizer = incremental(optax.sgd(0.125), layer, RULE, share=partitions({1: 0.5, 2: 1.0}))
    params = nnx.state(layer, nnx.Param)
    state = optimizer.init(params)
    g = np.float32([1.0, -1.0, 0.5, 2.0, 0.25, -0.5])
    grads = jax.tree.map(lambda p: jnp.ones_like(p), params)
    grads["kernel"][...] = jnp.asarray(g)[:, None]
    frozen = np.zeros(6, bool)
    update = jax.jit(optimizer.update)
    for share in (0.0, 0.5, 1.0, 1.0):
        # Section 2.2: the largest of the free weights, as many as the share asks for.
        free = [i for i in np.argsort(-np.abs(w), kind="stable") if not frozen[i]]
        frozen[free[: round(share * 6) - frozen.sum()]] = True
        for i in range(6):
            if frozen[i]:  # the scale is the first largest weight, 1
                w[i] = LEVELS[np.argmin(np.abs(LEVELS - w[i]))]
            else:
                w[i] -= 0.125 * g[i]  # Eq. 8
        steps, state = update(grads, state, params)
        params = optax.apply_updates(params, steps)
        # w + (level - w) is one rounding, of numbers of at most 1.
        np.testing.assert_allclose(params["kernel"][...][:, 0], w, rtol=0, atol=2.0**-24)
        np.testing.assert_array_equal(state.frozen["kernel"][...][:, 0], frozen)
    # What no rule matches is trained all the time.
    np.testing.assert_allclose(params["bias"][...], -0.125 * 4)
    assert frozen.all()


def test_everything_frozen_packs_to_the_same_values(toy):
    model = toy()
    recipe = lb.Recipe.from_string("up|down=w4a16_pow2")
    optimizer = incremental(optax.adam(0.01), model, recipe, share=partitions({0: 0.4, 2: 1.0}))
    graphdef, params, rest = nnx.split(model, nnx.Param, ...)
    state = optimizer.init(params)

    @jax.jit
    def step(params, state):
        grads = jax.tree.map(jnp.sin, params)
        updates, state = optimizer.update(grads, state, params)
        return optax.apply_updates(params, updates), state

    for _ in range(4):
        params, state = step(params, state)
    trained = nnx.merge(graphdef, params, rest)
    packed = lb.pack_model(lb.quantize_model(trained, recipe))
    for name in ("up", "down"):
        kernel = getattr(trained, name).kernel[...]
        assert_same_bits(getattr(packed, name).quantized_kernel(), kernel)
        assert not np.array_equal(kernel, getattr(model, name).kernel[...])


def test_schedules_that_do_not_rise_and_missing_parameters_are_refused(toy):
    assert [float(partitions({1: 0.5, 3: 1.0})(i)) for i in range(5)] == [0, 0.5, 0.5, 1, 1]
    for shares in ({}, {0: 0.0}, {0: 0.5, 1: 0.5}, {0: 0.5, 1: 1.5}):
        with pytest.raises(ValueError, match="shares rise with the number of updates"):
            partitions(shares)
    optimizer = incremental(optax.sgd(0.1), toy(), "w4a16", share=partitions({0: 1.0}))
    with pytest.raises(ValueError, match="incremental: 2 kernels of the recipe"):
        optimizer.init({"other": jnp.zeros(3)})
