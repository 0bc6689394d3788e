import json

import jax.numpy as jnp
import numpy as np
import pytest

from lowbit_jax import formats, testing

pytestmark = pytest.mark.usefixtures("strict_dtypes")


def _sweep():
    """Dense around the grids, random bit patterns of every exponent, and the ends of float32."""
    dense = np.linspace(-140, 140, 2**15 + 1, dtype=np.float32)
    fine = np.linspace(-2, 2, 2**14 + 1, dtype=np.float32)
    patterns = np.random.default_rng(0).integers(0, 2**32, 2**16, dtype=np.uint32)
    exponents = (np.arange(256, dtype=np.uint32) << 23)[:, None] + np.uint32([0, 1, 0x7FFFFF])
    values = np.concatenate([patterns, exponents.ravel(), exponents.ravel() | 0x80000000])
    values = values.view(np.float32)
    return np.concatenate([dense, fine, values[np.isfinite(values)]])


@pytest.mark.parametrize("fmt", formats.ALL, ids=lambda fmt: fmt.name)
def test_decode_of_encode_is_round(fmt):
    testing.check_format(fmt, _sweep())


@pytest.mark.parametrize("fmt", formats.ALL, ids=lambda fmt: fmt.name)
def test_round_goes_to_a_nearest_value(fmt):
    v = _sweep()
    v = v[np.abs(v) < 1e6]
    table = np.unique(np.asarray(fmt.round(jnp.asarray(v))).astype(np.float64))
    middles = (table[1:] + table[:-1]) / 2
    nearest = table[np.searchsorted(middles, v.astype(np.float64))]
    got = np.asarray(fmt.round(jnp.asarray(v))).astype(np.float64)
    # As far away as the nearest one: on ties either neighbour. NF4's middles are float32 numbers,
    # whose rounding moves a tie by half a unit in the last place.
    slack = 2.0**-24 if fmt.name == "nf4" else 0.0
    assert (np.abs(got - v) <= np.abs(nearest - v) + slack).all()


@pytest.mark.parametrize("fmt", formats.ALL, ids=lambda fmt: fmt.name)
def test_infinities_saturate_and_nan_stays(fmt):
    got = np.asarray(fmt.round(jnp.float32([np.inf, -np.inf, np.nan])))
    ends = np.asarray(fmt.round(jnp.float32([1e6, -1e6])))
    np.testing.assert_array_equal(got[:2], ends)
    assert np.isnan(got[2])


def test_names_are_unique_and_found():
    assert len({fmt.name for fmt in formats.ALL}) == len(formats.ALL)
    for fmt in formats.ALL:
        assert formats.get(fmt.name) is fmt
        assert hash(fmt) == hash(formats.get(fmt.name))
        assert formats.from_key(formats.to_key(fmt)) is fmt
    # Half-shifted levels of one bit are binary at half the scale.
    assert formats.get("int1") is formats.BINARY


def test_an_unknown_format_lists_the_nearest():
    with pytest.raises(ValueError, match=r"'int44'.*int4"):
        formats.get("int44")


def test_a_codebook_of_ones_own_obeys_the_law_and_travels_as_json():
    fmt = formats.codebook([-1.0, -0.3, -0.0, 0.7, 0.9])
    assert fmt.bits == 3
    assert fmt.zero_code == 2
    testing.check_format(fmt, _sweep())
    key = json.loads(json.dumps(formats.to_key(fmt)))
    assert formats.from_key(key) == fmt
    # The same values have the same name, other values another.
    assert formats.codebook(fmt.values) == fmt
    assert formats.codebook([-1.0, 1.0]).name != fmt.name


def test_a_codebook_that_borrows_a_name_is_still_written_in_full():
    impostor = formats.codebook([-1.0, 1.0], name="nf4")
    assert formats.from_key(formats.to_key(impostor)) == impostor


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ([-1.0, np.nan, 1.0], "finite values, not nan"),
        ([-1.0, np.inf], "finite values, not inf"),
        ([0.5, -0.5], r"ascends.* 0\.5 is followed by -0\.5"),
        ([0.0, 0.0, 1.0], r"ascends.*entries 0 and 1.*sorted\(set"),
        ([1.0, 1.0 + 1e-9], "each float32 value once"),
        ([1.0], "1 values do not fit"),
        (np.arange(257.0), "257 values do not fit codes of 8 bits"),
    ],
)
def test_a_codebook_with_bad_values_is_refused(values, message):
    with pytest.raises(ValueError, match=message):
        formats.codebook(values)


def test_keys_of_codebooks_are_checked():
    key = formats.to_key(formats.codebook([-1.0, 1.0]))
    with pytest.raises(ValueError, match="colour"):
        formats.from_key(key | {"colour": 1})
    with pytest.raises(ValueError, match="do not fit codes of 1 bits"):
        formats.from_key(key | {"values": [0.0, 1.0, 2.0]})
    unregistered = formats.Minifloat("fp5", 5, exponent_bits=2, mantissa_bits=2, largest=7.0)
    with pytest.raises(NotImplementedError, match=r"'fp5'.*only codebooks"):
        formats.to_key(unregistered)
