"""Values and gradients of the papers' training-time quantizers, one scalar at a time."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lowbit_jax import formats
from lowbit_jax.quantizers import (
    INQ,
    N2UQ,
    PACT,
    TTQ,
    TWN,
    XNOR,
    APoT,
    CentredSign,
    DoReFa,
    ElasticBinary,
    EntropyPreserving,
    LQNets,
    LSQPlus,
    RSign,
    Sign,
    StretchedElastic,
)
from lowbit_jax.scale_formats import E8M0
from lowbit_jax.spec import PerGroup, PerTensor, QuantSpec

pytestmark = pytest.mark.usefixtures("strict_dtypes")

BINARY = QuantSpec(format=formats.BINARY)
# A few roundings of float32 in values of the order of one.
CLOSE = {"rtol": 1e-5, "atol": 1e-6}


def _x(shape=(16, 3), seed=0, spread=1.0):
    return (np.random.default_rng(seed).normal(size=shape) * spread).astype(np.float32)


def _run(q, x, state):
    """Value and gradients of sum(g * fake_quant), with the g that was used."""
    g = _x(x.shape, seed=99)
    value, vjp = jax.vjp(lambda x, s: q.fake_quant(x, s), jnp.asarray(x), state)
    dx, ds = vjp(jnp.asarray(g))
    return np.asarray(value), np.asarray(dx), {k: np.asarray(v) for k, v in ds.items()}, g


@pytest.mark.parametrize("gradient", ["identity", "hard_tanh", "polynomial"])
def test_sign_of_binaryconnect_bnn_and_bi_real(gradient):
    x = np.float32([[-2.0, -1.0, -0.75, -0.25, 0.0, 0.25, 0.75, 1.0, 2.0]]).T
    value, dx, _, g = _run(Sign(BINARY, gradient=gradient), x, {})
    for i, v in enumerate(x[:, 0].astype(float)):
        assert value[i, 0] == (1.0 if v >= 0 else -1.0)
        if gradient == "identity":
            slope = 1.0
        elif gradient == "hard_tanh":
            slope = 1.0 if abs(v) <= 1 else 0.0
        elif -1 <= v < 0:
            slope = 2 + 2 * v
        else:
            slope = 2 - 2 * v if 0 <= v < 1 else 0.0
        assert dx[i, 0] == np.float32(g[i, 0] * np.float32(slope))


def test_xnor_gradient_is_that_of_section_3_1():
    x = _x()
    value, dx, _, g = _run(XNOR(BINARY), x, {})
    for j in range(3):
        mean = np.mean([abs(float(v)) for v in x[:, j]])
        for i in range(16):
            np.testing.assert_allclose(value[i, j], math.copysign(mean, x[i, j]), **CLOSE)
            slope = 1 / 16 + (mean if abs(x[i, j]) <= 1 else 0.0)
            np.testing.assert_allclose(dx[i, j], g[i, j] * slope, **CLOSE)


def test_rsign_moves_its_threshold_with_the_derivative_of_bi_real():
    x, threshold = _x(), np.float32([[0.3, -0.2, 0.0]])
    q = RSign(QuantSpec(format=formats.BINARY, granularity=PerTensor()))
    value, dx, ds, g = _run(q, x, {"threshold": jnp.asarray(threshold)})
    expected = np.zeros(3)
    for (i, j), v in np.ndenumerate(x):
        u = float(v) - float(threshold[0, j])
        assert value[i, j] == (1.0 if u >= 0 else -1.0)
        slope = max(2 - 2 * abs(u), 0.0)
        np.testing.assert_allclose(dx[i, j], g[i, j] * slope, **CLOSE)
        expected[j] -= g[i, j] * slope
    np.testing.assert_allclose(ds["threshold"][0], expected, **CLOSE)


def test_twn_threshold_and_scale_are_those_of_the_paper():
    x = _x((64, 4))
    value, dx, _, g = _run(TWN(QuantSpec(format=formats.TERNARY)), x, {})
    for j in range(4):
        column = x[:, j].astype(np.float64)
        delta = 0.7 * np.abs(column).mean()
        alpha = np.abs(column[np.abs(column) > delta]).mean()
        expected = [0.0 if abs(v) <= delta else math.copysign(alpha, v) for v in column]
        np.testing.assert_allclose(value[:, j], expected, **CLOSE)
    np.testing.assert_array_equal(dx, g)


def test_twn_of_zeros_is_zeros():
    zeros = jnp.zeros((8, 2), jnp.float32)
    assert not np.asarray(TWN(QuantSpec(format=formats.TERNARY)).fake_quant(zeros, {})).any()


@pytest.mark.parametrize("bits", [2, 4])
def test_dorefa_weights_are_those_of_the_paper(bits):
    x = _x(seed=3)
    spec = QuantSpec(format=formats.get(f"int{bits}_half"), granularity=PerTensor())
    value, dx, _, g = _run(DoReFa(spec), x, {})
    largest, steps = max(math.tanh(abs(float(v))) for v in x.flat), 2**bits - 1
    for index, v in np.ndenumerate(x):
        unit = math.tanh(float(v)) / (2 * largest) + 0.5
        np.testing.assert_allclose(value[index], 2 * round(unit * steps) / steps - 1, **CLOSE)
        # 2 d/dw (tanh w / (2 max) + 1/2), the rounding straight-through.
        slope = (1 - math.tanh(float(v)) ** 2) / largest
        np.testing.assert_allclose(dx[index], g[index] * slope, **CLOSE)


def test_pact_clips_at_a_learned_value():
    x, alpha = _x(spread=2.0), 1.7
    q = PACT(QuantSpec(format=formats.UINT3, granularity=PerTensor(), symmetric=False))
    value, dx, ds, g = _run(q, x, {"clip": jnp.full((1, 1), alpha, jnp.float32)})
    expected = 0.0
    for index, v in np.ndenumerate(x):  # Eqs. 1 to 3
        y = 0.5 * (abs(v) - abs(v - alpha) + alpha)
        np.testing.assert_allclose(value[index], round(y * 7 / alpha) * alpha / 7, **CLOSE)
        assert dx[index] == (g[index] if 0 < v < alpha else 0.0)
        expected += g[index] if v >= alpha else 0.0
    np.testing.assert_allclose(ds["clip"][0, 0], expected, **CLOSE)


def test_lsq_plus_learns_scale_and_offset():
    x, s, z = _x(spread=2.0), 0.3, 5
    q = LSQPlus(
        QuantSpec(format=formats.UINT4, granularity=PerTensor(), symmetric=False),
        gradient_scale=False,
    )
    beta = -z * s
    leaves = {"scale": s, "offset": beta + 0.05}  # the offset is used at the nearest multiple of s
    state = {k: jnp.full((1, 1), v, jnp.float32) for k, v in leaves.items()}
    value, dx, ds, g = _run(q, x, state)
    expected = {"scale": 0.0, "offset": 0.0}
    for index, xi in np.ndenumerate(x):
        v = (float(xi) - beta) / s
        inside = 0 <= v <= 15
        np.testing.assert_allclose(value[index], min(max(round(v), 0), 15) * s + beta, **CLOSE)
        assert dx[index] == (g[index] if inside else 0.0)
        expected["scale"] += g[index] * (round(v) - v if inside else min(max(v, 0), 15))
        expected["offset"] += 0.0 if inside else g[index]
    for name, total in expected.items():
        # 48 products of at most 15.
        np.testing.assert_allclose(ds[name][0, 0], total, rtol=1e-5, atol=48 * 15 * 2.0**-22)


def test_lsq_plus_starts_from_the_extremes_it_was_calibrated_on():
    q = LSQPlus(QuantSpec(format=formats.UINT4, granularity=PerTensor(), symmetric=False))
    state = q.init(jnp.zeros((1, 4), jnp.float32))
    assert np.isnan(q.fake_quant(jnp.ones((1, 4), jnp.float32), state)).all()
    for row in ([-1.0, 0.5], [0.0, 2.0], [0.25, -0.25]):
        state = q.observe(jnp.float32([row]), state)
    np.testing.assert_allclose(state["offset"], [[-1.0]])
    np.testing.assert_allclose(state["scale"], [[3 / 15]], rtol=1e-6)


@pytest.mark.parametrize("granularity", [PerTensor(), PerGroup(8)], ids=str)
def test_elastic_binary_learns_its_scale(granularity):
    x, alpha = _x((16, 1)), 0.8
    q = ElasticBinary(QuantSpec(format=formats.BINARY, granularity=granularity))
    shape = q.spec.scale_shape(x.shape)
    value, dx, ds, g = _run(q, x, {"scale": jnp.full(shape, alpha, jnp.float32)})
    expected, block = np.zeros(shape), 16 // shape[0]
    for i in range(16):
        np.testing.assert_allclose(value[i, 0], math.copysign(alpha, x[i, 0]), **CLOSE)
        assert dx[i, 0] == (g[i, 0] if abs(x[i, 0]) < np.float32(alpha) else 0.0)
        expected[i // block, 0] += g[i, 0] * math.copysign(1, x[i, 0]) / math.sqrt(block)
    np.testing.assert_allclose(ds["scale"], expected, **CLOSE)
    start = q.init(jnp.asarray(x))["scale"]
    np.testing.assert_allclose(start, np.abs(x).reshape(*shape, -1).mean(-1), **CLOSE)


@pytest.mark.parametrize(
    ("fmt", "n", "s"), [(formats.TERNARY, 1.5, 0.0), (formats.INT2_HALF, 2.0, 0.5)], ids=str
)
def test_stretched_levels_and_gradients_are_those_of_paretoq(fmt, n, s):
    x, alpha = _x((16, 2)), 1.1
    q = StretchedElastic(QuantSpec(format=fmt))
    value, dx, ds, g = _run(q, x, {"alpha": jnp.full((1, 2), alpha, jnp.float32)})
    expected = np.zeros(2)
    for (i, j), w in np.ndenumerate(x):
        share = float(w) / alpha
        clipped = min(max(share, -0.99), 0.99)
        level = (round(clipped * n - s) + s) / n
        np.testing.assert_allclose(value[i, j], alpha * level, **CLOSE)
        inside = abs(share) < 1
        assert dx[i, j] == (g[i, j] if inside else 0.0)
        expected[j] += g[i, j] * (level - share if inside else level) / math.sqrt(16)
    np.testing.assert_allclose(ds["alpha"][0], expected, **CLOSE)
    start = q.init(jnp.asarray(x))["alpha"]
    np.testing.assert_array_equal(start[0], np.abs(x).max(0))


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (lambda: TWN(BINARY), NotImplementedError, r"TWN.*'ternary'.*not for binary"),
        (lambda: Sign(BINARY, gradient="relu"), ValueError, r"'relu'.*hard_tanh"),
        (lambda: DoReFa(QuantSpec(format=formats.INT4_HALF)), ValueError, r"PerTensor\(\)"),
        (lambda: RSign(BINARY), ValueError, r"PerTensor\(\)"),
        (lambda: TWN(QuantSpec(format=formats.TERNARY), threshold=-1.0), ValueError, "-1"),
    ],
)
def test_specs_that_a_paper_does_not_have_are_refused(make, error, message):
    with pytest.raises(error, match=message):
        make()


def test_ttq_learns_both_magnitudes():
    x, w_p, w_n = _x((32, 3)), np.float32([[0.9, 1.1, 1.3]]), np.float32([[0.7, 0.5, 1.2]])
    q = TTQ(QuantSpec(format=formats.TERNARY_LEARNED))
    value, dx, ds, g = _run(q, x, {"positive_scale": w_p, "negative_scale": w_n})
    by_p, by_n = np.zeros(3), np.zeros(3)
    for j in range(3):
        threshold = 0.05 * max(abs(float(v)) for v in x[:, j])
        for i, v in enumerate(x[:, j].astype(float)):
            if v > threshold:  # Eq. 6, 7 and 8
                expected, slope = w_p[0, j], w_p[0, j]
                by_p[j] += g[i, j]
            elif v < -threshold:
                expected, slope = -w_n[0, j], w_n[0, j]
                by_n[j] -= g[i, j]
            else:
                expected, slope = 0.0, 1.0
            assert value[i, j] == expected  # the learned numbers themselves
            np.testing.assert_allclose(dx[i, j], g[i, j] * slope, **CLOSE)
    np.testing.assert_allclose(ds["positive_scale"][0], by_p, **CLOSE)
    np.testing.assert_allclose(ds["negative_scale"][0], by_n, **CLOSE)


def test_ttq_starts_at_the_means_of_both_sides():
    x = _x((64, 2))
    state = TTQ(QuantSpec(format=formats.TERNARY_LEARNED)).init(jnp.asarray(x))
    for j in range(2):
        limit = 0.05 * np.abs(x[:, j]).max()
        above, below = x[x[:, j] > limit, j].mean(), -x[x[:, j] < -limit, j].mean()
        np.testing.assert_allclose(state["positive_scale"][0, j], above, **CLOSE)
        np.testing.assert_allclose(state["negative_scale"][0, j], below, **CLOSE)


def test_lq_nets_takes_the_step_of_its_algorithm():
    x, v = _x((48, 2)), np.float32([[0.3, 0.5], [0.8, 0.6]])
    q = LQNets(QuantSpec(format=formats.BASIS2))
    value, dx, _, g = _run(q, x, {"basis": jnp.asarray(v)})
    moved = np.asarray(q.observe(jnp.asarray(x), {"basis": jnp.asarray(v)})["basis"])
    for j in range(2):
        encodings = [(a, b) for a in (-1, 1) for b in (-1, 1)]
        levels = [a * float(v[0, j]) + b * float(v[1, j]) for a, b in encodings]
        signs = np.zeros((2, 48))
        for i, w in enumerate(x[:, j].astype(float)):
            nearest = int(np.argmin([abs(w - level) for level in levels]))
            np.testing.assert_allclose(value[i, j], levels[nearest], **CLOSE)
            signs[:, i] = encodings[nearest]
        best = np.linalg.inv(signs @ signs.T) @ signs @ x[:, j].astype(np.float64)
        np.testing.assert_allclose(moved[:, j], 0.9 * v[:, j] + 0.1 * best, rtol=1e-5, atol=1e-5)
    np.testing.assert_array_equal(dx, g)  # straight-through


def test_lq_nets_start_fits_normal_weights_better_than_equidistant_levels():
    x = _x((4096, 1), seed=4)
    q = LQNets(QuantSpec(format=formats.BASIS2))
    value = np.asarray(q.fake_quant(jnp.asarray(x), q.init(jnp.asarray(x))))
    # Max (1960): 0.1188 equidistant, 0.1175 free; a symmetric basis of two is free. One standard
    # error of the mean over 4096 samples is below 0.004.
    assert np.mean((value - x) ** 2) / np.mean(x**2) < 0.1188 + 0.004


@pytest.mark.parametrize("x", [np.zeros((16, 2)), np.ones((16, 2)), np.full((16, 2), -3.0)])
def test_lq_nets_takes_weights_of_a_single_value(x):
    x = jnp.asarray(x, jnp.float32)
    q = LQNets(QuantSpec(format=formats.BASIS3))
    state = q.observe(x, q.init(x))
    assert np.isfinite(np.asarray(state["basis"])).all()
    np.testing.assert_allclose(q.fake_quant(x, state), x, rtol=1e-5, atol=1e-6)


def test_n2uq_gradients_are_those_of_the_expected_code():
    x = np.abs(_x((40, 2), spread=0.8)).astype(np.float32)
    lengths, scale = np.float32([0.3, 0.9, 0.4]), 0.7
    q = N2UQ(QuantSpec(format=formats.UINT2, granularity=PerTensor(), symmetric=False))
    state = {
        "intervals": jnp.asarray(lengths).reshape(1, 3),
        "scale": jnp.full((1, 1), scale, jnp.float32),
    }
    value, dx, ds, g = _run(q, x, state)
    by_length, by_scale = np.zeros(3), 0.0
    ends = np.concatenate([[0.0], np.cumsum(lengths.astype(np.float64))])
    for index, v in np.ndenumerate(x.astype(np.float64)):
        code = sum(v >= ends[i] + lengths[i] / 2 for i in range(3))
        np.testing.assert_allclose(value[index], code * scale, **CLOSE)
        by_scale += g[index] * code
        slope = 0.0
        for i in range(3):
            if ends[i] <= v < ends[i + 1]:
                slope = scale / lengths[i]
                by_length[i] -= g[index] * scale * (v - ends[i]) / float(lengths[i]) ** 2
                by_length[:i] -= g[index] * scale / lengths[i]
        np.testing.assert_allclose(dx[index], g[index] * slope, **CLOSE)
    np.testing.assert_allclose(ds["intervals"][0], by_length, rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(ds["scale"][0, 0], by_scale, rtol=1e-4)


def test_n2uq_with_equal_intervals_is_uniform_rounding_straight_through():
    x = np.abs(_x((40, 2))).astype(np.float32)
    q = N2UQ(QuantSpec(format=formats.UINT3, granularity=PerTensor(), symmetric=False))
    state = q.observe(jnp.asarray(x), q.init(jnp.asarray(x)))
    value, dx, _, g = _run(q, x, state)
    step = float(state["scale"][0, 0])
    np.testing.assert_allclose(step, x.max() / 7, **CLOSE)
    for index, v in np.ndenumerate(x):
        np.testing.assert_allclose(value[index], math.floor(v / step + 0.5) * step, **CLOSE)
        if v < x.max():
            np.testing.assert_allclose(dx[index], g[index], **CLOSE)


@pytest.mark.parametrize("bits", [2, 4])
def test_n2uq_weights_use_all_levels_evenly(bits):
    x = _x((32, 2), seed=5)
    q = EntropyPreserving(QuantSpec(format=formats.get(f"int{bits}_half")))
    value, dx, _, g = _run(q, x, {})
    for j in range(2):
        mean, steps = np.abs(x[:, j].astype(np.float64)).mean(), 2**bits - 1
        factor = 2 ** (bits - 1) / steps / mean
        for i, v in enumerate(x[:, j].astype(float)):
            unit = (min(max(v * factor, -1.0), 1.0) + 1) / 2 * steps
            expected = (2 * round(unit) / steps - 1) / factor
            np.testing.assert_allclose(value[i, j], expected, **CLOSE)
            assert dx[i, j] == (g[i, j] if abs(v * factor) <= 1 else 0.0)
    uniform = np.linspace(-1, 1, 4000, dtype=np.float32)[:, None]
    codes = np.asarray(q.freeze(jnp.asarray(uniform), {}).codes())
    counts = np.bincount(codes.reshape(-1), minlength=2**bits)
    assert counts.max() - counts.min() <= 2


def test_bitnet_subtracts_the_mean_of_the_weights():
    x = _x((16, 3)) + np.float32(0.4)
    spec = QuantSpec(format=formats.BINARY, granularity=PerTensor())
    value, dx, _, g = _run(CentredSign(spec), x, {})
    alpha, beta = float(np.mean(x, dtype=np.float64)), float(np.mean(np.abs(x), dtype=np.float64))
    for index, v in np.ndenumerate(x):
        np.testing.assert_allclose(value[index], beta if v >= alpha else -beta, **CLOSE)
    np.testing.assert_array_equal(dx, g)


def test_inq_levels_are_those_of_the_paper():
    x = _x((32, 2), seed=6, spread=0.37)
    value, dx, _, g = _run(INQ(QuantSpec(format=formats.POW2_4, scale_format=E8M0)), x, {})
    for j in range(2):
        n1 = math.floor(math.log2(4 * float(np.abs(x[:, j]).max()) / 3))  # Eq. 3
        magnitudes = [0.0] + [2.0 ** (n1 - i) for i in reversed(range(7))]
        for i, v in enumerate(x[:, j].astype(float)):
            expected = None
            for low, high in zip([0.0, *magnitudes[1:-1]], magnitudes[1:], strict=True):  # Eq. 4
                if (low + high) / 2 <= abs(v) and (high == magnitudes[-1] or abs(v) < 1.5 * high):
                    expected = math.copysign(high, v)
            expected = 0.0 if expected is None else expected
            assert value[i, j] == expected, (v, n1)
    np.testing.assert_array_equal(dx, g)


def test_apot_learns_its_clipping():
    x, alpha = _x((32, 2), seed=7), np.float32([[0.9, 1.6]])
    q = APoT(QuantSpec(format=formats.APOT5))
    value, dx, ds, g = _run(q, x, {"alpha_scale": jnp.asarray(alpha)})
    levels = np.asarray(formats.APOT5.values) / 1.5
    for j in range(2):
        a, total = float(alpha[0, j]), 0.0
        for i, v in enumerate(x[:, j].astype(float)):
            share = min(max(v / a, -1.0), 1.0)
            level = levels[int(np.argmin(np.abs(levels - share)))]
            np.testing.assert_allclose(value[i, j], a * level, **CLOSE)
            inside = abs(v) <= a
            assert dx[i, j] == (g[i, j] if inside else 0.0)
            total += g[i, j] * (level - share if inside else math.copysign(1, v))
        np.testing.assert_allclose(ds["alpha_scale"][0, j], total / math.sqrt(32), **CLOSE)
