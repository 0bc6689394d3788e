import jax.numpy as jnp
import numpy as np
import pytest

from lowbit_jax import calibrate, formats
from lowbit_jax.grid import snap
from lowbit_jax.spec import (
    E8M0,
    Block,
    PerChannel,
    PerGroup,
    PerTensor,
    PerToken,
    QuantSpec,
)

pytestmark = pytest.mark.usefixtures("strict_dtypes")

EPS = np.finfo(np.float32).eps


def _normal(shape, seed=0):
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


@pytest.mark.parametrize(
    ("fmt", "divisor"),
    [
        (formats.INT3, 3.5),  # 2 absmax / (2**3 - 1)
        (formats.INT4, 7.5),
        (formats.INT8, 127.5),
        (formats.INT8_NARROW, 127),
        (formats.INT2_HALF, 1.5),  # 2 absmax / 3
        (formats.TERNARY, 1),
        (formats.FP4_E2M1, 6),
        (formats.NF4, 1),
    ],
    ids=str,
)
def test_absmax_over_the_half_range(fmt, divisor):
    x = _normal((32, 4))
    range_ = calibrate.absmax(jnp.asarray(x), QuantSpec(format=fmt))
    # One rounding of the reciprocal, one of the product.
    np.testing.assert_allclose(range_.scale[0], np.abs(x).max(0) / divisor, rtol=EPS)


@pytest.mark.parametrize(
    ("fmt", "emax"), [(formats.FP4_E2M1, 2), (formats.INT8_NARROW, 6), (formats.INT4, 3)], ids=str
)
def test_mx_scales_are_the_exponent_of_the_maximum_less_that_of_the_format(fmt, emax):
    x = np.zeros((32, 3), np.float32)
    x[3] = [1.0, -7.99, 8.0]
    spec = QuantSpec(format=fmt, granularity=PerGroup(32), scale_format=E8M0)
    expected = [2.0 ** (e - emax) for e in (0, 2, 3)]
    assert calibrate.absmax(jnp.asarray(x), spec).scale[0].tolist() == expected


def test_minmax_holds_zero_and_both_ends():
    x = np.float32([[1.0, -3.0, -1.0, 0.0], [2.0, -1.0, 3.0, 0.0]])
    spec = QuantSpec(format=formats.UINT4, symmetric=False)
    range_ = calibrate.minmax(jnp.asarray(x), spec)
    np.testing.assert_allclose(range_.scale[0][:3], np.float32([2, 3, 4]) / 15, rtol=EPS)
    # round(-min / scale): 0, 15, 3.75 -> 4, and nothing to cover.
    assert range_.zero_point[0].tolist() == [0.0, 15.0, 4.0, 0.0]
    assert np.asarray(snap(jnp.asarray(x), spec, range_))[:, 3].tolist() == [0.0, 0.0]


@pytest.mark.parametrize(
    ("granularity", "shape"),
    [
        (PerTensor(), (64, 16)),
        (PerChannel(), (2, 64, 16)),
        (PerGroup(16), (64, 16)),
        (Block(16, 4), (64, 16)),
        (Block(1, 1), (4, 8)),
        (PerChannel(), (1, 8)),
        (PerTensor(), (1, 8)),
        (PerToken(), (3, 64)),
        (PerTensor(), (4096, 4)),
        (PerTensor(), (2, 70000)),  # sums over N that would overflow an int32
    ],
    ids=str,
)
@pytest.mark.parametrize("data", ["normal", "constant", "outlier"])
def test_absmean_is_the_mean_of_float64(granularity, shape, data):
    x = {"normal": _normal(shape), "constant": np.full(shape, -0.3, np.float32)}.get(data)
    if x is None:
        x = _normal(shape)
        x.flat[0] = 1e3
    spec = QuantSpec(format=formats.TERNARY, granularity=granularity)
    scale_shape = spec.scale_shape(shape)
    split = [d for n, s in zip(shape, scale_shape, strict=True) for d in (s, n // s)]
    blocks = np.abs(x).astype(np.float64).reshape(split)
    inside = tuple(range(1, 2 * len(shape), 2))
    expected = blocks.mean(inside).reshape(scale_shape)
    largest = blocks.max(inside).reshape(scale_shape)
    got = np.asarray(calibrate.absmean(jnp.asarray(x), spec).scale)
    # Fixed point: half of max / 2**fraction_bits, fraction_bits = 30 - log2 of the first axis of a
    # block; then roundings of the unit, the sum, the reciprocal, the product and the quotient.
    axis = granularity.axis if shape[granularity.axis] != scale_shape[granularity.axis] else -1
    length = shape[axis] // scale_shape[axis]
    fixed = largest * 2.0 ** -(31 - max(np.ceil(np.log2(length)), 1))
    assert (np.abs(got - expected) <= fixed + 4 * EPS * expected).all()


def test_absmean_of_a_constant_is_the_constant():
    for value in np.float32([0.02, 1 / 3, 7.0, 1e-3, 1e4]):
        x = jnp.full((48, 6), value)
        got = calibrate.absmean(x, QuantSpec(format=formats.TERNARY, granularity=PerTensor())).scale
        # Roundings of unit, sum, reciprocal, product, quotient: half a unit in the last place each.
        np.testing.assert_allclose(got, value, rtol=2.5 * EPS)


def test_absmean_never_falls_below_eps_and_keeps_nan_and_infinity():
    spec = QuantSpec(format=formats.TERNARY)
    x = np.zeros((4, 4), np.float32)
    x[1, 1], x[2, 2], x[3, 3] = np.nan, np.inf, 1e-7
    scale = np.asarray(calibrate.absmean(jnp.asarray(x), spec, eps=1e-3).scale)[0]
    assert scale[0] == scale[3] == np.float32(1e-3)
    assert np.isnan(scale[1])
    assert np.isinf(scale[2])


@pytest.mark.parametrize("name", ["int2_half", "int3", "int4", "nf4", "fp4_e2m1"])
def test_the_searched_range_beats_absmax(name):
    x = jnp.asarray(_normal((64, 8)))
    spec = QuantSpec(format=formats.get(name))
    errors = [
        np.square(np.asarray(snap(x, spec, f(x, spec))) - np.asarray(x)).sum(0)
        for f in (calibrate.absmax, calibrate.mse)
    ]
    # Absmax is the first candidate, so no column is worse; at few bits the sum is far better.
    assert (errors[1] <= errors[0] * (1 + 64 * EPS)).all()
    assert errors[1].sum() < errors[0].sum()


def test_the_searched_asymmetric_range_beats_minmax():
    x = jnp.asarray(_normal((64, 8)) ** 2)
    spec = QuantSpec(format=formats.UINT2, symmetric=False)
    errors = [
        np.square(np.asarray(snap(x, spec, f(x, spec))) - np.asarray(x)).sum()
        for f in (calibrate.minmax, calibrate.mse)
    ]
    assert errors[1] < errors[0]


def test_specs_of_the_other_kind_are_refused():
    x, symmetric = jnp.ones((4, 4)), QuantSpec(format=formats.INT4)
    asymmetric = QuantSpec(format=formats.UINT4, symmetric=False)
    for f, spec in (
        (calibrate.absmax, asymmetric),
        (calibrate.minmax, symmetric),
        (calibrate.absmean, asymmetric),
    ):
        with pytest.raises(ValueError, match="symmetric"):
            f(x, spec)
