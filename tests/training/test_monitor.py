import jax.numpy as jnp
import numpy as np
import optax
import pytest

import lowbit_jax as lb
from lowbit_jax.training.monitor import describe, initial_codes, make_monitor
from lowbit_jax.training.step import split


def watched(toy, recipe):
    graphdef, state = split(lb.quantize_model(toy(), recipe), optax.sgd(0.1))
    monitor = make_monitor(graphdef)
    return monitor, state, initial_codes(monitor, graphdef, state)


def test_nothing_flips_until_a_weight_crosses_into_another_code(toy):
    monitor, state, codes = watched(toy, "w1a16")
    row = describe(*monitor(state, codes))
    assert (row["flips"], row["saturation"]) == (0.0, 1.0), "a binary code is always at an end"
    kernel = state.params["up"]["kernel"]
    # Half of the signs of `up` (16 x 32 weights), none of `down` (32 x 16).
    mirrored = jnp.concatenate([-kernel[:8], kernel[8:]])
    state.params["up"]["kernel"] = kernel.replace(mirrored)
    row = describe(*monitor(state, codes))
    assert row["layers"]["up"]["flips"] == 0.5
    assert row["layers"]["down"]["flips"] == 0.0
    assert row["flips"] == 0.25


@pytest.mark.parametrize("recipe", ["w1_58a8", "w4a16_asym"])
def test_saturation_and_scale_are_those_of_the_frozen_kernel(toy, recipe):
    model = lb.quantize_model(toy(), recipe)
    monitor, state, codes = watched(toy, recipe)
    row = describe(*monitor(state, codes))
    for path, layer in lb.quantized_layers(model):
        q = layer.freeze_kernel()
        values = np.asarray(q.spec.format.decode(q.codes()))
        ends = np.asarray(q.spec.format.round(jnp.float32([-1e9, 1e9])))
        got = row["layers"][path]
        # float32 means of 512 numbers.
        tolerance = {"rtol": 512 * np.finfo(np.float32).eps}
        np.testing.assert_allclose(got["saturation"], np.isin(values, ends).mean(), **tolerance)
        factor = 1.0 if q.global_scale is None else np.asarray(q.global_scale)
        scale = (np.float32(q.scale) * factor).mean()
        np.testing.assert_allclose(got["scale"], scale, **tolerance)


def test_a_float_model_has_nothing_to_tell(toy):
    graphdef, state = split(toy(), optax.sgd(0.1))
    monitor = make_monitor(graphdef)
    assert describe(*monitor(state, initial_codes(monitor, graphdef, state))) == {}
