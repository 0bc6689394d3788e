import jax
import jax.numpy as jnp
import numpy as np
import optax

import lowbit_jax as lb
from lowbit_jax.training.calibration import Calibration
from lowbit_jax.training.step import split


def test_statistics_are_found_and_parameters_stay(toy):
    graphdef, state = split(lb.quantize_model(toy(), "nvfp4"), optax.sgd(0.1))
    calibration = Calibration(graphdef, state, every=3)
    assert [step for step in range(8) if calibration.due(step)] == [0, 3, 6]
    before = jax.tree.leaves(state.rest)
    assert not all(bool(jnp.isfinite(x).all()) for x in before), "never calibrated is not a number"
    got = calibration(state, jnp.arange(18, dtype=jnp.int32).reshape(2, 9) % 16)
    for leaf in jax.tree.leaves(got.rest):
        assert bool((jnp.isfinite(leaf) & (leaf > 0)).all())
    for a, b in zip(jax.tree.leaves(got.params), jax.tree.leaves(state.params), strict=True):
        np.testing.assert_array_equal(a, b)


def test_models_without_statistics_are_never_due(toy):
    for model in (toy(), lb.quantize_model(toy(), "w1_58a8")):
        graphdef, state = split(model, optax.sgd(0.1))
        assert not Calibration(graphdef, state, every=1).due(0)
