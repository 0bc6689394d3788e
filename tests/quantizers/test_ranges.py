import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lowbit_jax import calibrate, formats, testing
from lowbit_jax.quantizers import Absmax, AbsMean, MinMax, StaticAbsmax
from lowbit_jax.scale_formats import E4M3
from lowbit_jax.spec import PerChannel, PerGroup, PerTensor, PerToken, QuantSpec

pytestmark = pytest.mark.usefixtures("strict_dtypes")

INT8 = QuantSpec(format=formats.INT8_NARROW, granularity=PerTensor())
NVFP4_ROWS = QuantSpec(format=formats.FP4_E2M1, granularity=PerToken(16), scale_format=E4M3)


@pytest.mark.parametrize(
    "q",
    [
        Absmax(QuantSpec(format=formats.INT4)),
        MinMax(QuantSpec(format=formats.UINT4, symmetric=False)),
        AbsMean(QuantSpec(format=formats.TERNARY)),
    ],
    ids=lambda q: type(q).__name__,
)
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_gradients_pass_straight_through_the_range_included(q, dtype):
    w = jnp.asarray(testing.awkward_array((32, 8), 0), dtype)
    g = jnp.asarray(testing.awkward_array((32, 8), 1), dtype)
    _, vjp = jax.vjp(lambda w: q.fake_quant(w, {}), w)
    testing.assert_same_bits(vjp(g)[0], g)


def test_a_row_of_activations_does_not_depend_on_its_batch():
    x = testing.awkward_array((6, 32), 2, axis=-1)
    for q in (
        Absmax(QuantSpec(format=formats.INT8_NARROW, granularity=PerToken())),
        StaticAbsmax(NVFP4_ROWS),
    ):
        state = testing.calibrated(q, jnp.asarray(x))
        batch = np.asarray(q.fake_quant(jnp.asarray(x), state))
        alone = np.asarray(q.fake_quant(jnp.asarray(x[2:3]), state))
        testing.assert_same_bits(batch[2:3], alone)
    with pytest.raises(ValueError, match="StaticAbsmax"):
        Absmax(NVFP4_ROWS)


def test_static_ranges_are_nan_until_they_are_calibrated():
    for q in (StaticAbsmax(INT8), StaticAbsmax(NVFP4_ROWS)):
        x = jnp.ones((4, 32), jnp.float32)
        state = q.init(x)
        assert np.isnan(q.fake_quant(x, state)).all()
        state = q.observe(x, state)
        np.testing.assert_allclose(q.fake_quant(x, state), x, rtol=1e-6)  # 127 * (1 / 127)


def test_static_ranges_keep_the_largest_magnitude_seen_and_saturate_beyond_it():
    q = StaticAbsmax(INT8)
    state = q.init(jnp.ones((1, 4), jnp.float32))
    for row in ([1.0, -2.0], [0.5, -3.0], [0.0, 1.0]):
        state = q.observe(jnp.float32([row]), state)
    assert state["absmax"].tolist() == [[3.0]]
    got = q.fake_quant(jnp.float32([[30.0, -30.0]]), state)
    np.testing.assert_allclose(got, [[3.0, -3.0]], rtol=1e-6)
    # Batches of any rank share the statistic.
    assert q.fake_quant(jnp.ones((2, 3, 4), jnp.float32), state).shape == (2, 3, 4)


def test_static_ranges_are_those_of_absmax_on_the_array_they_were_calibrated_on():
    x = jnp.asarray(testing.awkward_array((8, 32), 3))
    q = StaticAbsmax(INT8)
    expected = calibrate.absmax(x, INT8).scale
    testing.assert_same_bits(q.range(x, testing.calibrated(q, x)).scale, expected)


@pytest.mark.parametrize("granularity", [PerChannel(), PerGroup(16), PerToken()])
def test_one_statistic_cannot_serve_many_scales(granularity):
    with pytest.raises(ValueError, match="PerTensor"):
        StaticAbsmax(QuantSpec(format=formats.INT8, granularity=granularity))


def test_absmean_has_one_level_of_scales():
    spec = QuantSpec(format=formats.FP4_E2M1, granularity=PerGroup(16), scale_format=E4M3)
    with pytest.raises(NotImplementedError, match="Absmax"):
        AbsMean(spec)


def test_absmean_has_its_eps_as_the_smallest_scale():
    w = jnp.full((8, 2), 1e-4, jnp.float32)
    q = AbsMean(QuantSpec(format=formats.TERNARY), eps=1e-2)
    assert float(q.range(w, {}).scale[0, 0]) == np.float32(1e-2)
    assert not np.asarray(q.fake_quant(w, {})).any()


def test_a_moving_average_follows_the_batches():
    q = StaticAbsmax(INT8, momentum=0.75)
    state = q.init(jnp.ones((1, 4), jnp.float32))
    seen = []
    for largest in (4.0, 8.0, 0.0):
        state = q.observe(jnp.float32([[largest, -largest / 2, 0.0, 0.0]]), state)
        seen.append(float(state["absmax"][0, 0]))
    assert seen == [4.0, 5.0, 3.75]
    for wrong in (1.0, -0.1):
        with pytest.raises(ValueError, match="momentum"):
            StaticAbsmax(INT8, momentum=wrong)
