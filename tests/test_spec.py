import dataclasses
import json

import jax.numpy as jnp
import numpy as np
import pytest

from lowbit_jax import formats, testing
from lowbit_jax.scale_formats import (
    BFLOAT16,
    DYADIC16,
    E4M3,
    E8M0,
    E8M0_CEIL,
    E8M0_EVEN,
    FLOAT16,
    SCALE_FORMATS,
    dyadic_parts,
)
from lowbit_jax.spec import Block, PerChannel, PerGroup, PerTensor, PerToken, QuantSpec

pytestmark = pytest.mark.usefixtures("strict_dtypes")


@pytest.mark.parametrize(
    ("granularity", "shape", "scale_shape"),
    [
        (PerTensor(), (64, 32), (1, 1)),
        (PerTensor(), (3, 64, 32), (3, 1, 1)),
        (PerChannel(), (3, 64, 32), (3, 1, 32)),
        (PerGroup(16), (64, 32), (4, 32)),
        (Block(16, 8), (2, 64, 32), (2, 4, 4)),
        (Block(None, 8), (64, 32), (1, 4)),
        (Block(1, 1), (4, 2), (4, 2)),
        (PerToken(), (5, 7, 64), (5, 7, 1)),
        (PerToken(16), (5, 64), (5, 4)),
        (PerToken(), (64,), (1,)),
    ],
)
def test_the_scale_has_the_rank_of_the_array(granularity, shape, scale_shape):
    spec = QuantSpec(format=formats.INT4, granularity=granularity)
    assert spec.scale_shape(shape) == scale_shape


def test_a_length_that_does_not_split_names_the_numbers_and_what_fits():
    spec = QuantSpec(format=formats.INT4, granularity=PerGroup(64))
    with pytest.raises(ValueError, match=r"length 96 .* groups of 64 \(96 = 1 \* 64 \+ 32\)") as e:
        spec.scale_shape((96, 8))
    assert "[32, 16, 8]" in str(e.value)
    with pytest.raises(ValueError, match=r"output axis of length 10 .* groups of 4"):
        QuantSpec(format=formats.INT4, granularity=Block(2, 4)).scale_shape((8, 10))
    with pytest.raises(ValueError, match="use per-channel"):
        spec.scale_shape((7, 8))


def test_an_array_of_too_few_axes_is_refused():
    with pytest.raises(ValueError, match=r"shape \(8,\) .* at least 2 axes"):
        QuantSpec(format=formats.INT4).scale_shape((8,))


@pytest.mark.parametrize("make", [lambda: Block(0, 1), lambda: Block(1, -1), lambda: PerToken(0)])
def test_blocks_have_elements(make):
    with pytest.raises(ValueError, match="at least 1 element"):
        make()


def test_zero_points_belong_to_unsigned_formats():
    with pytest.raises(ValueError, match=r"Use symmetric=True or the format uint4"):
        QuantSpec(format=formats.INT4, symmetric=False)
    with pytest.raises(ValueError, match=r"Use symmetric=False or the format int4"):
        QuantSpec(format=formats.UINT4)
    for scale_format in (E8M0, E4M3):
        with pytest.raises(NotImplementedError, match=scale_format.name):
            QuantSpec(format=formats.UINT4, symmetric=False, scale_format=scale_format)


def test_json_round_trip_of_every_admitted_quantizers_spec():
    for spec in {q.spec for q in testing.admitted()}:
        assert QuantSpec.from_dict(json.loads(json.dumps(spec.to_dict()))) == spec


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"colour": 1}, "colour"),
        ({"format": "int44"}, "int4"),
        ({"scale_format": "float8"}, "float8.*e4m3"),
        ({"granularity": {"type": "PerRow"}}, "PerRow.*Block"),
        ({"granularity": {"type": "Block", "m": 3}}, "m.*k"),
        ({"granularity": {"type": "Block", "k": 0, "n": 1}}, "at least 1"),
    ],
)
def test_unknown_keys_and_names_are_refused(change, message):
    good = QuantSpec(format=formats.INT4).to_dict()
    with pytest.raises(ValueError, match=message):
        QuantSpec.from_dict(good | change)


def test_a_spec_needs_a_format_and_the_rest_has_defaults():
    with pytest.raises(ValueError, match="format"):
        QuantSpec.from_dict({"symmetric": True})
    assert QuantSpec.from_dict({"format": "int4"}) == QuantSpec(format=formats.INT4)


def test_specs_are_static_values():
    spec = QuantSpec(format=formats.INT4)
    assert hash(spec) == hash(QuantSpec(format=formats.INT4))
    with pytest.raises(dataclasses.FrozenInstanceError):
        spec.symmetric = False


def _scales():
    rng = np.random.default_rng(0)
    wide = np.exp2(rng.uniform(-118, 127, 4096)).astype(np.float32)
    near = np.exp2(rng.uniform(-12, 10, 4096)).astype(np.float32)
    return np.concatenate([wide, near, np.exp2(np.arange(-118, 127)).astype(np.float32)])


@pytest.mark.parametrize("scale_format", [BFLOAT16, FLOAT16, E4M3], ids=lambda f: f.name)
def test_scales_round_as_their_dtype_does(scale_format):
    scales = _scales()
    scales = scales[scales < scale_format.largest]  # ml_dtypes overflows where we saturate
    expected = scales.astype(scale_format.dtype).astype(np.float32)
    expected = np.maximum(expected, np.float32(scale_format.smallest))
    np.testing.assert_array_equal(scale_format.round(jnp.asarray(scales)), expected)


def test_e8m0_rounds_down_to_a_power_of_two():
    scales = _scales()
    expected = np.exp2(np.floor(np.log2(scales.astype(np.float64))))
    np.testing.assert_array_equal(E8M0.round(jnp.asarray(scales)), expected.astype(np.float32))


def test_directed_e8m0_rounds_up_and_is_its_own_key():
    scales = _scales()
    scales = scales[scales < 2.0**127]
    expected = np.exp2(np.ceil(np.log2(scales.astype(np.float64))))
    np.testing.assert_array_equal(E8M0_CEIL.round(jnp.asarray(scales)), expected.astype(np.float32))
    assert [f.key for f in (E8M0, E8M0_CEIL, E8M0_EVEN)] == ["e8m0", "e8m0_ceil", "e8m0_even"]
    with pytest.raises(NotImplementedError, match="int4 has none"):
        QuantSpec(format=formats.INT4, scale_format=E8M0_EVEN)


def test_dyadic_scales_are_integers_over_powers_of_two():
    scale = DYADIC16.round(jnp.asarray(_scales()))
    b, c = (np.asarray(part, np.int64) for part in dyadic_parts(scale))
    assert ((b >= 1) & (b < 2**16) & (c >= 0) & (c <= 46)).all()
    np.testing.assert_array_equal(b / 2.0**c, np.asarray(scale, np.float64))
    # Half a unit in the last of 16 bits, where c is free.
    near = np.float32([0.3, 1e-3, 7.7])
    np.testing.assert_allclose(DYADIC16.round(jnp.asarray(near)), near, rtol=2.0**-16)


def test_a_spec_with_a_codebook_of_ones_own_travels_as_json():
    spec = QuantSpec(format=formats.codebook([-1.0, 0.0, 0.5]), scale_format=E8M0_CEIL)
    assert QuantSpec.from_dict(json.loads(json.dumps(spec.to_dict()))) == spec


@pytest.mark.parametrize("scale_format", SCALE_FORMATS.values(), ids=lambda f: f.key)
def test_storing_a_rounded_scale_is_exact(scale_format):
    rounded = scale_format.round(jnp.asarray(_scales()))
    stored = scale_format.store(rounded)
    assert stored.dtype == scale_format.dtype
    np.testing.assert_array_equal(np.asarray(stored).astype(np.float32), rounded)
    np.testing.assert_array_equal(scale_format.round(rounded), rounded)


@pytest.mark.parametrize("scale_format", SCALE_FORMATS.values(), ids=lambda f: f.key)
def test_scales_saturate_at_both_ends_and_keep_nan(scale_format):
    got = np.asarray(scale_format.round(jnp.float32([0.0, 1e-45, np.nan, 3.4e38])))
    assert (got[:2] == np.float32(scale_format.smallest)).all()
    assert np.isnan(got[2])
    # 3.4e38 lies above all but float32's largest; e8m0 rounds it down.
    assert got[3] == np.minimum(np.float32(3.4e38), np.float32(scale_format.largest))
