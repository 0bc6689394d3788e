"""The law of quantizers, for all of them: training sees what the checkpoint stores, bit for bit.

Eager, every quantizer meets every format, every granularity and every scale format that it admits;
the whole product is marked slow. Programs cost a compilation each: they run one case of every
kind of arithmetic, and must also give the very bits of the eager run, codes and scales included.
"""

import functools
import random

import hypothesis
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import strategies as st

from lowbit_jax import formats, testing
from lowbit_jax.qtensor import encode
from lowbit_jax.quantizers import (
    INQ,
    LSQ,
    N2UQ,
    PACT,
    TTQ,
    TWN,
    Absmax,
    AbsMean,
    APoT,
    CentredSign,
    DoReFa,
    EntropyPreserving,
    LQNets,
    LSQPlus,
    MinMax,
    RSign,
    StaticAbsmax,
    StretchedElastic,
)
from lowbit_jax.scale_formats import BFLOAT16, E4M3, E8M0, FLOAT16
from lowbit_jax.spec import Block, PerChannel, PerGroup, PerTensor, PerToken, QuantSpec

pytestmark = pytest.mark.usefixtures("strict_dtypes")

DTYPES = (jnp.float32, jnp.bfloat16)


@functools.cache
def _every():
    return [
        # The searched start costs a compiled loop per spec; the law holds for any scale.
        LSQ(q.spec, start="absmax") if isinstance(q, LSQ) else q
        for q in testing.admitted()
    ]


def _pairs(q):
    parts = (q.spec.format.name, q.spec.granularity, q.spec.scale_format.key)
    return {(type(q), part) for part in parts}


@functools.cache
def _covering():
    """Few quantizers that together hold every pair of `_pairs`; half of them see bfloat16."""
    seen, chosen, cases = set(), [], list(_every())
    random.Random(0).shuffle(cases)  # in order, every format would meet the first scale format
    for q in cases:
        if not _pairs(q) <= seen:
            seen |= _pairs(q)
            chosen.append((q, DTYPES[len(chosen) % 2]))
    return chosen


def test_the_default_run_leaves_out_no_pair():
    covered = set().union(*(_pairs(q) for q, _ in _covering()))
    assert covered == set().union(*map(_pairs, _every()))
    assert len(_covering()) < len(_every()) / 10


def _learned(states, factors):
    """States as training leaves them: no longer what the array's range is."""
    return [{name: leaf * factors for name, leaf in state.items()} for state in states]


@pytest.mark.parametrize("fmt", formats.ALL, ids=lambda fmt: fmt.name)
def test_training_sees_what_the_checkpoint_stores(fmt):
    for q, dtype in _covering():
        if q.spec.format == fmt:
            x = testing.awkward_array((1, 64, 32), seed=0, axis=q.spec.granularity.axis)
            testing.Law([q], testing.eager).check(jnp.asarray(x, dtype))


@pytest.mark.slow
@pytest.mark.parametrize("magnitude", [1.0, 1e-36, 1e-30, 1e30])
@pytest.mark.parametrize("fmt", formats.ALL, ids=lambda fmt: fmt.name)
def test_training_sees_what_the_checkpoint_stores_at_every_magnitude(fmt, magnitude):
    for q in _every():
        if q.spec.format == fmt:
            axis = q.spec.granularity.axis
            x = testing.awkward_array((1, 64, 32), seed=1, magnitude=magnitude, axis=axis)
            for dtype in DTYPES:
                testing.Law([q], testing.eager).check(jnp.asarray(x, dtype))


# One case of every kind of arithmetic: formats, levels of scales, zero points, block shapes.
WEIGHTS = (
    Absmax(QuantSpec(format=formats.INT4, granularity=PerGroup(16), scale_format=BFLOAT16)),
    Absmax(QuantSpec(format=formats.FP4_E2M1, granularity=PerGroup(16), scale_format=E4M3)),
    Absmax(QuantSpec(format=formats.INT2_HALF, granularity=Block(16, 8))),
    Absmax(QuantSpec(format=formats.NF4, granularity=PerGroup(16), scale_format=FLOAT16)),
    MinMax(QuantSpec(format=formats.UINT3, granularity=PerChannel(), symmetric=False)),
    AbsMean(QuantSpec(format=formats.TERNARY, granularity=PerTensor())),
    AbsMean(QuantSpec(format=formats.BINARY, granularity=Block(16, None), scale_format=BFLOAT16)),
    LSQ(QuantSpec(format=formats.INT3, granularity=PerChannel()), start="absmax"),
    TWN(QuantSpec(format=formats.TERNARY, granularity=PerGroup(16))),
    StretchedElastic(QuantSpec(format=formats.INT2_HALF, granularity=PerChannel())),
    DoReFa(QuantSpec(format=formats.INT4_HALF, granularity=PerTensor())),
    TTQ(QuantSpec(format=formats.TERNARY_LEARNED, granularity=Block(16, 8))),
    LQNets(QuantSpec(format=formats.BASIS3, scale_format=E8M0), start_steps=2),
    CentredSign(QuantSpec(format=formats.BINARY, granularity=PerTensor())),
    EntropyPreserving(QuantSpec(format=formats.INT3_HALF)),
    INQ(QuantSpec(format=formats.POW2_4, granularity=PerGroup(16), scale_format=E8M0)),
    APoT(QuantSpec(format=formats.APOT5)),
)
ACTIVATIONS = (
    Absmax(QuantSpec(format=formats.INT8_NARROW, granularity=PerToken())),
    Absmax(QuantSpec(format=formats.FP4_E2M1, granularity=PerToken(16), scale_format=E8M0)),
    StaticAbsmax(QuantSpec(format=formats.FP4_E2M1, granularity=PerToken(16), scale_format=E4M3)),
    StaticAbsmax(QuantSpec(format=formats.INT8, granularity=PerTensor())),
    PACT(QuantSpec(format=formats.UINT4, granularity=PerTensor(), symmetric=False), start=2.0),
    RSign(QuantSpec(format=formats.BINARY, granularity=PerTensor())),
    LSQPlus(QuantSpec(format=formats.UINT4, granularity=PerTensor(), symmetric=False)),
    N2UQ(QuantSpec(format=formats.UINT3, granularity=PerTensor(), symmetric=False)),
)


@functools.cache
def _law(cases, mode):
    # Weights are cut along K, at whole groups, and along N; activations by rows and along K.
    mesh = jax.make_mesh((4, 2), ("k", "n"), axis_types=(jax.sharding.AxisType.Auto,) * 2)
    transforms = {
        "eager": testing.eager,
        "jitted": testing.jitted,
        "vmapped": testing.vmapped,
        "scanned": testing.scanned,
        "sharded": testing.sharded(mesh, "k", "n"),
    }
    return testing.Law(cases, transforms[mode])


def _stack(cases, seed, magnitude, dtype):
    axis = cases[0].spec.granularity.axis
    x = testing.awkward_array((2, 64, 16), seed, magnitude=magnitude, axis=axis)
    return jnp.asarray(x, dtype)


def _programs():
    """All quantizers jitted and sharded; mapped and scanned one half, the other when slow."""
    halves = (
        ("weights-float32", WEIGHTS[::2], jnp.float32, False),
        ("weights-bfloat16", WEIGHTS[1::2], jnp.bfloat16, True),
        ("activations-bfloat16", ACTIVATIONS[::2], jnp.bfloat16, False),
        ("activations-float32", ACTIVATIONS[1::2], jnp.float32, True),
    )
    for mode in ("jitted", "vmapped", "scanned", "sharded"):
        for name, cases, dtype, second in halves:
            marks = [pytest.mark.slow] if second and mode in ("vmapped", "scanned") else []
            yield pytest.param(mode, cases, dtype, id=f"{mode}-{name}", marks=marks)


@pytest.mark.parametrize(("mode", "cases", "dtype"), _programs())
def test_every_program_gives_the_bits_of_the_eager_one(mode, cases, dtype):
    x = _stack(cases, 3, 1.0, dtype)
    states = _learned([testing.stacked_state(q, x) for q in cases], np.float32(0.7))
    expected = _law(cases, "eager").check(x, states)
    actual = _law(cases, mode).check(x, states)
    testing.assert_same_bits(actual, expected, f"{mode} against eager")


@hypothesis.settings(max_examples=25)
@hypothesis.given(
    seed=st.integers(0, 2**31 - 1),
    exponent=st.integers(-30, 30),
    factor=st.floats(-0.5, 2.0, width=32),
)
def test_the_law_holds_for_any_data_and_any_learned_scale(seed, exponent, factor):
    cases = WEIGHTS[::2] if seed % 2 else WEIGHTS[1::2]
    dtype = jnp.float32 if seed % 2 else jnp.bfloat16
    x = _stack(cases, seed, 10.0**exponent, dtype)
    states = [testing.stacked_state(q, x) for q in cases]
    # Also scales that training drove to zero or below: they are used at the smallest there is.
    _law(cases, "jitted").check(x, _learned(states, np.float32(factor)))


def test_no_code_depends_on_how_the_array_is_cut():
    cases = (
        Absmax(QuantSpec(format=formats.INT4, granularity=PerGroup(16))),
        AbsMean(QuantSpec(format=formats.TERNARY, granularity=PerTensor())),
        AbsMean(QuantSpec(format=formats.TERNARY, granularity=PerChannel())),
    )
    mesh = jax.make_mesh((8,), ("d",), axis_types=(jax.sharding.AxisType.Auto,))
    x = testing.awkward_array((1, 128, 16), seed=5)
    whole = testing.Law(cases, testing.jitted).check(x)
    for axes in (("d", None), (None, "d")):  # along K, along N
        cut = testing.Law(cases, testing.sharded(mesh, *axes)).check(x)
        testing.assert_same_bits(cut, whole, f"8 devices, {axes}")


def test_training_steps_see_it_too():
    # The values inside a differentiated program with work before and after the quantizer.
    q = WEIGHTS[1]
    w = jnp.asarray(testing.awkward_array((64, 16), seed=6), jnp.bfloat16)
    x = jnp.asarray(testing.awkward_array((4, 64), seed=7), jnp.bfloat16)

    @jax.jit
    def step(w, x):
        def loss(w):
            w_hat = q.fake_quant(w, {})
            return jnp.sum(jnp.dot(x, w_hat).astype(jnp.float32)), w_hat

        return jax.grad(loss, has_aux=True)(w)

    gradient, w_hat = step(w, x)
    testing.assert_same_bits(w_hat, q.freeze(w, {}).dequantize(), "the kernel in a training step")
    # Straight through: the gradient of sum(x @ w) is the sum of x over rows, in bfloat16.
    expected = np.asarray(x, np.float32).sum(0)
    actual = np.asarray(gradient, np.float32)
    tolerance = 4 * 2.0**-8 * np.abs(np.asarray(x, np.float32)).sum(0)[:, None]
    assert (np.abs(actual - expected[:, None]) <= tolerance).all()


@pytest.mark.parametrize("cases", [WEIGHTS, ACTIVATIONS], ids=["weights", "activations"])
def test_subnormal_numbers_count_as_zeros(cases):
    tiny = np.float32([1e-39, -1e-39, -1e-45, 0.0]).repeat(4)
    x = np.broadcast_to(tiny, (64, 16)).copy()
    x[:, 8:] += np.float32(1)  # lines with something in them
    x[0, 8:] = -1e-40
    for q in cases:
        testing.Law([q], testing.eager).check(x[None])


@pytest.mark.parametrize("q", WEIGHTS + ACTIVATIONS, ids=str)
def test_nan_is_never_hidden(q):
    x = testing.awkward_array((64, 16), seed=8)
    state = testing.calibrated(q, jnp.asarray(x))
    x[5, 3] = np.nan
    seen = np.asarray(q.fake_quant(jnp.asarray(x), state))
    assert np.isnan(seen[5, 3])


@pytest.mark.parametrize("q", WEIGHTS + ACTIVATIONS, ids=str)
def test_requantizing_with_the_same_range_keeps_every_code(q):
    x = jnp.asarray(testing.awkward_array((64, 16), seed=9, axis=q.spec.granularity.axis))
    state = testing.calibrated(q, x)
    frozen = q.freeze(x, state)
    again = encode(frozen.dequantize(), q.spec, frozen.range())
    np.testing.assert_array_equal(again.codes(), frozen.codes())
