import itertools

import jax.numpy as jnp
import numpy as np
import pytest

from lowbit_jax import calibrate, formats
from lowbit_jax.grid import snap
from lowbit_jax.scale_formats import E8M0, E8M0_CEIL, E8M0_EVEN, SCALE_FORMATS
from lowbit_jax.spec import Block, PerChannel, PerGroup, PerTensor, PerToken, QuantSpec

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


@pytest.mark.parametrize(
    ("scale_format", "expected"),
    [
        # The exponent of the maximum less e2m1's 2: 7.99 saturates at 6.
        (E8M0, [1, 1, 1, 1, 2]),
        # The least power of two with 6 * scale >= maximum: nothing saturates.
        (E8M0_CEIL, [1, 2, 2, 2, 2]),
        # The maximum rounded to one bit of mantissa first: 7 is a tie and goes to 8.
        (E8M0_EVEN, [1, 1, 2, 2, 2]),
    ],
    ids=lambda v: getattr(v, "key", ""),
)
def test_directed_mx_scales(scale_format, expected):
    x = np.zeros((32, 5), np.float32)
    x[7] = [6.0, -6.99, 7.0, 7.99, 8.0]
    spec = QuantSpec(format=formats.FP4_E2M1, granularity=PerGroup(32), scale_format=scale_format)
    assert calibrate.absmax(jnp.asarray(x), spec).scale[0].tolist() == expected


@pytest.mark.parametrize("granularity", [PerTensor(), PerChannel(), PerGroup(16), PerToken(8)])
@pytest.mark.parametrize("share", [0.5, 0.9, 1.0])
def test_quantile_is_that_of_numpy(granularity, share):
    x = _normal((64, 8))
    spec = QuantSpec(format=formats.INT4, granularity=granularity)
    scale_shape = spec.scale_shape(x.shape)
    split = [d for n, s in zip(x.shape, scale_shape, strict=True) for d in (s, n // s)]
    expected = np.quantile(np.abs(x).reshape(split), share, axis=(1, 3)) / 7.5
    got = calibrate.quantile(jnp.asarray(x), spec, share=share).scale
    # The position between two order statistics: 512 elements, a unit in its last place.
    np.testing.assert_allclose(got, expected, rtol=1e-5, atol=512 * EPS)


def test_asymmetric_quantiles_cut_both_ends_and_hold_zero():
    x = np.arange(1, 102, dtype=np.float32)[:, None]
    spec = QuantSpec(format=formats.UINT4, symmetric=False)
    range_ = calibrate.quantile(jnp.asarray(x), spec, share=0.9)
    assert range_.zero_point[0, 0] == 0.0
    np.testing.assert_allclose(range_.scale, [[96 / 15]], rtol=1e-6)  # the 95th percentile


def test_quantile_checks_its_arguments():
    with pytest.raises(ValueError, match=r"share=1\.5 is not in \(0, 1\]"):
        calibrate.quantile(jnp.ones((4, 4)), QuantSpec(format=formats.INT4), share=1.5)
    two_levels = QuantSpec(
        format=formats.FP4_E2M1, granularity=PerGroup(2), scale_format=SCALE_FORMATS["e4m3"]
    )
    with pytest.raises(NotImplementedError, match="absmax"):
        calibrate.quantile(jnp.ones((4, 4)), two_levels)


@pytest.mark.parametrize("granularity", [PerTensor(), PerChannel(), PerGroup(4), Block(4, 2)])
def test_the_exact_ternary_range_beats_every_subset_of_magnitudes(granularity):
    x = _normal((8, 2), seed=5)
    spec = QuantSpec(format=formats.TERNARY, granularity=granularity)
    range_ = calibrate.exact(jnp.asarray(x), spec)
    error = np.square(np.asarray(snap(jnp.asarray(x), spec, range_), np.float64) - x)
    k, n = spec.granularity.sizes(x.shape)
    for i, j in itertools.product(range(0, 8, k), range(0, 2, n)):
        m = np.abs(x[i : i + k, j : j + n].astype(np.float64)).ravel()
        # Whatever set of weights is kept, its best scale is the mean; 2**16 sets at most.
        sets = np.array(list(itertools.product([0, 1], repeat=m.size)))
        kept = sets.sum(1)
        best = np.min(np.square(m).sum() - (sets @ m) ** 2 / np.maximum(kept, 1))
        assert abs(error[i : i + k, j : j + n].sum() - best) <= 1e-5 * np.square(m).sum()


def test_the_exact_binary_range_is_the_mean_magnitude():
    x = jnp.asarray(_normal((16, 3)))
    spec = QuantSpec(format=formats.BINARY)
    np.testing.assert_array_equal(
        calibrate.exact(x, spec).scale, calibrate.absmean(x, spec, eps=0.0).scale
    )
    with pytest.raises(NotImplementedError, match=r"int4 per channel.*mse"):
        calibrate.exact(x, QuantSpec(format=formats.INT4))


def test_the_exact_range_of_zeros_is_the_smallest_scale():
    spec = QuantSpec(format=formats.TERNARY)
    range_ = calibrate.exact(jnp.zeros((8, 2), jnp.float32), spec)
    assert np.isfinite(range_.scale).all()
    assert (np.asarray(range_.scale) > 0).all()


def test_kl_keeps_a_full_range_and_cuts_a_lonely_outlier():
    flat = np.ones(256)
    assert calibrate.kl_threshold(flat, 0.5, levels=32) == 128.0  # 256 bins: nothing is gained
    # A half-normal in the first bins, and one magnitude at the end of 1024.
    magnitudes = np.abs(np.random.default_rng(0).normal(size=50000)) * 40
    counts = np.histogram(np.append(magnitudes, 1023.5), bins=1024, range=(0, 1024))[0]
    threshold = calibrate.kl_threshold(counts, 1.0, levels=64)
    # Beyond two deviations of the mass, far short of the outlier.
    assert 80 < threshold < 400


@pytest.mark.parametrize(
    ("counts", "message"),
    [
        (np.ones(64), r"shape \(64,\).*128"),
        (np.zeros(256), "no data"),
        (-np.ones(256), "negative"),
        (np.full(256, np.nan), "NaN"),
    ],
)
def test_bad_histograms_are_refused(counts, message):
    with pytest.raises(ValueError, match=message):
        calibrate.kl_threshold(counts, 1.0)


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
