"""Reconstruction: each method does better than the one that it starts from."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import lowbit_jax as lb
from lowbit_jax import ptq
from lowbit_jax.ptq.ranges import find_range
from lowbit_jax.ptq.reconstruction import engine
from lowbit_jax.ptq.reconstruction.variables import Start, learned_kernel, settled

SCHEME = "w2a16_asym"


def error(model, recipe, batches, *stages):
    """Relative squared error of the last block's output."""
    _, report = ptq.run(model, recipe, batches, list(stages))
    return report.blocks[-1]["output_error"]


@pytest.fixture(scope="module")
def nearest(decoder, batches):
    return error(decoder, SCHEME, batches, ptq.RoundToNearest("mse"))


METHODS = {
    "AdaRound": ptq.AdaRound(steps=100, lr=3e-2),
    "BRECQ": ptq.BRECQ(steps=60, batch=4, lr=3e-2, objective="fisher"),
    "AutoRound": ptq.AutoRound(steps=60, batch=4, bits=2),
    "OmniQuant": ptq.OmniQuant(steps=60, batch=4, lr=5e-2, equivalence=ptq.Equivalence(5e-3)),
    "EfficientQAT": ptq.EfficientQAT(steps=60, batch=4, lr=1e-3)[0],
}


@pytest.mark.parametrize("name", METHODS)
def test_each_method_beats_round_to_nearest(name, decoder, batches, nearest):
    assert error(decoder, SCHEME, batches, METHODS[name]) < nearest


def test_qdrop_learns_with_quantized_activations(decoder, batches):
    stage = ptq.QDrop(steps=60, batch=4, lr=3e-2)
    assert error(decoder, "w4a4", batches, stage) < error(
        decoder, "w4a4", batches, ptq.RoundToNearest("mse")
    )


def test_end_to_end_lowers_the_divergence_and_moves_no_code(decoder, batches):
    solver = ptq.RoundToNearest("mse")
    before, _ = ptq.run(decoder, SCHEME, batches, [solver])
    after, _ = ptq.run(decoder, SCHEME, batches, [solver, ptq.EndToEnd(steps=40, batch=4)])
    assert divergence(decoder, after, batches) < divergence(decoder, before, batches)
    for (path, old), (_, new) in zip(
        lb.quantized_layers(before), lb.quantized_layers(after), strict=True
    ):
        np.testing.assert_array_equal(
            old.freeze_kernel().codes(), new.freeze_kernel().codes(), err_msg=path
        )
    packed = lb.pack_model(after)
    # The sums of up to 24 products, in 2 blocks and a head, have another order.
    np.testing.assert_allclose(packed(batches[0]), after(batches[0]), rtol=0, atol=2e-5)


def divergence(model, other, batches):
    log_p = jax.nn.log_softmax(model(batches[0]))
    log_q = jax.nn.log_softmax(other(batches[0]))
    return float(jnp.mean(jnp.sum(jnp.exp(log_p) * (log_p - log_q), axis=-1)))


SPECS = [
    lb.QuantSpec(format=lb.UINT3, granularity=lb.PerGroup(8), symmetric=False),
    lb.QuantSpec(format=lb.INT2_HALF),
    lb.QuantSpec(format=lb.INT4, scale_format=lb.FLOAT16),
    lb.QuantSpec(format=lb.FP4_E2M1, granularity=lb.PerGroup(8), scale_format=lb.E8M0),
]
VARIABLES = {
    "offset": (ptq.RoundingOffset(0.1), ptq.RangeShare(0.1)),
    "soft": (ptq.SoftRounding(0.1),),
    "clipping": (ptq.LearnedClipping(0.1),),
    "weights": (ptq.Weights(0.1), ptq.Scales(0.1), ptq.ZeroPoints(0.1)),
}


@pytest.mark.parametrize("spec", SPECS, ids=lambda spec: spec.describe())
@pytest.mark.parametrize("name", VARIABLES)
def test_what_was_settled_freezes_to_the_same_codes_and_so_do_the_weights_behind_it(spec, name):
    variables = VARIABLES[name]
    weight = jax.random.normal(jax.random.key(0), (16, 6))
    start = Start(weight, find_range(weight, spec, "minmax"))
    if name == "soft" and spec.format is lb.FP4_E2M1:
        with pytest.raises(NotImplementedError, match="floor and ceiling"):
            variables[0].init(start, spec)
        return
    parameters = [variable.init(start, spec) for variable in variables]
    noise = jax.random.normal(jax.random.key(1), weight.shape)
    parameters = [
        variable.project(jax.tree.map(lambda p: p + 0.3 * noise[: p.shape[0], : p.shape[1]], p))
        for variable, p in zip(variables, parameters, strict=True)
    ]
    found, range_, latent = settled(variables, parameters, start, spec)
    quantizer = lb.quantizers.FixedRange(spec)
    state = lb.quantizers.range_state(range_)
    for kernel in (found, latent):
        np.testing.assert_array_equal(quantizer.freeze(kernel, state).dequantize(), found)


@pytest.mark.parametrize("spec", SPECS[:3], ids=lambda spec: spec.describe())
@pytest.mark.parametrize("name", ["offset", "clipping", "weights"])
def test_training_sees_what_is_settled(spec, name):
    """Straight-through kernels are on the grid while they are learned."""
    variables = VARIABLES[name]
    weight = jax.random.normal(jax.random.key(0), (16, 6))
    start = Start(weight, find_range(weight, spec, "minmax"))
    parameters = [variable.init(start, spec) for variable in variables]
    found, _, _ = settled(variables, parameters, start, spec)
    seen = learned_kernel(variables, parameters, start, spec)
    # The same levels and scales, multiplied in another program.
    np.testing.assert_allclose(seen, found, rtol=1e-6, atol=1e-6)


def test_soft_rounding_starts_at_the_float_weights_and_hardens(decoder):
    """AdaRound's V starts so that the soft kernel is the float one, inside the range."""
    spec = SPECS[0]
    weight = jax.random.normal(jax.random.key(0), (16, 6))
    start = Start(weight, find_range(weight, spec, "minmax"))
    variable = ptq.SoftRounding()
    parameters = [variable.init(start, spec)]
    soft = learned_kernel((variable,), parameters, start, spec)
    # Minus what the saturation takes at the ends of a min-max range: half a step at most.
    assert float(jnp.abs(soft - weight).max()) <= 0.5 * float(start.range.scale.max()) + 1e-5
    assert float(jnp.median(jnp.abs(soft - weight))) < 1e-5


def test_same_seed_same_bits_and_other_seed_other_codes(decoder, batches):
    stage = ptq.AutoRound(steps=20, batch=2, bits=2)
    first, second, other = (
        ptq.run(decoder, SCHEME, batches, [stage], seed=seed)[0] for seed in (0, 0, 1)
    )
    codes = [
        np.concatenate([t.freeze_kernel().codes().ravel() for _, t in lb.quantized_layers(m)])
        for m in (first, second, other)
    ]
    np.testing.assert_array_equal(codes[0], codes[1])
    assert (codes[0] != codes[2]).any()


class Convolving(nnx.Module):
    def __init__(self, rngs):
        self.conv = nnx.Conv(4, 4, (3, 3), rngs=rngs)

    def __call__(self, x):
        return nnx.relu(self.conv(x))


class Convolutions(nnx.Module):
    def __init__(self, rngs):
        self.layers = nnx.List([Convolving(rngs) for _ in range(2)])

    def __call__(self, x):
        for layer in self.layers:
            x = layer(x)
        return jnp.mean(x, axis=(1, 2))


@pytest.mark.slow
def test_steps_of_convolutions_called_one_by_one_are_those_of_the_loop(monkeypatch):
    images = [jax.random.normal(jax.random.key(i), (8, 6, 6, 4)) for i in range(2)]
    stage = ptq.BRECQ(steps=30, batch=4, lr=3e-2)
    found = {}
    for loop in (True, False):
        if loop:
            monkeypatch.setattr(engine, "_slow_in_loops", lambda module: False)
        else:
            monkeypatch.undo()
            monkeypatch.setattr(engine, "_run", None)  # not called
        model, report = ptq.run(Convolutions(nnx.Rngs(0)), SCHEME, images, [stage])
        losses = [row["objective_last"] for row in report.layers]
        codes = [layer.freeze_kernel().codes() for _, layer in lb.quantized_layers(model)]
        found[loop] = losses, codes
    # Sums of another order; 30 steps of Adam at 3e-2 carry it on.
    np.testing.assert_allclose(found[True][0], found[False][0], rtol=1e-3)
    for a, b in zip(found[True][1], found[False][1], strict=True):
        assert np.mean(a != b) < 0.02


def test_an_objective_that_becomes_nan_stops_with_the_step(decoder, batches):
    stage = dataclasses.replace(METHODS["EfficientQAT"], variables=(ptq.Scales(float("inf")),))
    with pytest.raises(FloatingPointError, match="before step"):
        ptq.run(decoder, SCHEME, batches, [stage])


def test_a_users_model_without_wiring_is_told_what_to_pass(batches):
    class Plain(nnx.Module):
        def __init__(self, rngs):
            self.layers = nnx.List([nnx.Linear(4, 4, rngs=rngs) for _ in range(2)])

        def __call__(self, x):
            for layer in self.layers:
                x = layer(x)
            return x

    class Wrapped(nnx.Module):
        def __init__(self, rngs):
            self.layers = nnx.List([Plain(rngs) for _ in range(2)])

        def __call__(self, x):
            for layer in self.layers:
                x = layer(x)
            return x

    stage = ptq.OmniQuant(steps=2, equivalence=ptq.Equivalence())
    with pytest.raises(ValueError, match=r"which layer feeds which.* wiring=Wiring"):
        ptq.run(Wrapped(nnx.Rngs(0)), "w4a16", [jnp.ones((8, 4))], [stage])
