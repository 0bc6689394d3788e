"""What is wrong is refused with its numbers; what is merely degenerate has a defined value."""

import jax.numpy as jnp
import numpy as np
import pytest

import lowbit_jax as lb
from lowbit_jax import formats, quantizers
from lowbit_jax.scale_formats import E4M3, E8M0, FLOAT16, FLOAT32

MOST = [q for q in quantizers.ALL if q not in (quantizers.FixedRange,)]


def test_bits_out_of_range():
    with pytest.raises(ValueError, match="no format is named 'int9'"):
        formats.get("int9")
    with pytest.raises(ValueError, match="do not fit codes of 8 bits"):
        formats.codebook(np.arange(257.0))
    with pytest.raises(ValueError, match="levels=1 is not in 2 to 256"):
        formats.normal_codebook(1)


def test_a_group_that_does_not_divide():
    spec = lb.QuantSpec(format=lb.INT4, granularity=lb.PerGroup(48))
    message = r"length 96 .*|length 100 does not split into groups of 48 \(100 = 2 \* 48 \+ 4\)"
    with pytest.raises(ValueError, match=message):
        lb.quantize(jnp.ones((100, 4)), spec)


def test_asymmetric_ternary():
    with pytest.raises(ValueError, match=r"ternary, symmetric=False\): zero points belong to"):
        lb.QuantSpec(format=lb.TERNARY, symmetric=False)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ([0.0, np.nan], "finite values, not nan"),
        ([0.0, np.inf], "finite values, not inf"),
        ([1.0, 0.0], "ascends"),
        ([0.0, 0.0], "ascends, each float32 value once"),
        ([1.0], "do not fit codes"),
    ],
)
def test_codebooks(values, message):
    with pytest.raises(ValueError, match=message):
        formats.codebook(values)


@pytest.mark.parametrize("scale_format", [FLOAT32, FLOAT16, E8M0])
@pytest.mark.parametrize("scale", [0.0, 1e-45, 1e-40])
def test_a_scale_of_zero_or_subnormal_is_the_smallest_there_is(scale_format, scale):
    spec = lb.QuantSpec(format=lb.INT4, scale_format=scale_format)
    q = lb.quantize(jnp.ones((32, 2)), spec, scale=jnp.full((1, 2), scale))
    np.testing.assert_array_equal(q.scale.astype(jnp.float32), scale_format.smallest)
    np.testing.assert_array_equal(q.dequantize(), 7 * np.float32(scale_format.smallest))


def test_a_scale_of_zero_of_nvfp4_stands_for_zeros():
    spec = lb.QuantSpec(format=formats.FP4_E2M1, granularity=lb.PerGroup(16), scale_format=E4M3)
    q = lb.quantize(jnp.ones((32, 2)), spec, scale=jnp.zeros((2, 2)), global_scale=jnp.ones((1, 1)))
    assert not np.asarray(q.dequantize()).any()


@pytest.mark.parametrize("preset", ["w4a16_g32", "w4a16_asym", "w1_58a16", "w1_58a16_ttq",
    "w2a16_lq", "w3a16_lsq", "w1a16_bitnet", "w2a16_n2uq", "w4a16_inq", "w5a16_apot_learned",
    "mxfp4_quest", "nvfp4a16", "nf4_g64", "w2a16_stretched"])  # fmt: skip
def test_groups_of_zeros_are_finite_and_all_but_signs_are_zeros(preset):
    quantizer = lb.presets[preset].weight
    zeros = jnp.zeros((64, 2), jnp.float32)
    q = quantizer.freeze(zeros, quantizer.init(zeros))
    values = np.asarray(q.dequantize())
    assert np.isfinite(values).all()
    # Half-shifted levels and signs have no zero: their scale is as small as it gets.
    assert np.abs(values).max() < 1e-4


def test_infinite_weights():
    x = np.ones((32, 2), np.float32)
    x[3, 1], x[4, 0] = np.inf, np.nan
    with pytest.raises(ValueError, match="2 of 64 values that are NaN or infinite"):
        lb.quantize(jnp.asarray(x), lb.QuantSpec(format=lb.INT4))
