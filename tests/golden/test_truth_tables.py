"""Every code of every format, written out or computed without jax."""

import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

from lowbit_jax import formats

pytestmark = pytest.mark.usefixtures("strict_dtypes")

# Two's complement with the sign bit flipped: code 0 is the most negative integer.
_INTEGERS = {f"int{b}": [c - 2 ** (b - 1) for c in range(2**b)] for b in range(2, 9)}
_UNSIGNED = {f"uint{b}": list(range(2**b)) for b in range(2, 9)}
# OCP MX v1.0, table 5 (FP4): S EE M, bias 1.
_E2M1 = [0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0]


def _small_float(exponent_bits: int, mantissa_bits: int) -> list[float]:
    """S E.. M.. read as the OCP's OFP8 specification says, one code at a time, no special codes."""
    bias, table = 2 ** (exponent_bits - 1) - 1, []
    for code in range(2 ** (1 + exponent_bits + mantissa_bits)):
        mantissa = code % 2**mantissa_bits / 2**mantissa_bits
        exponent = code // 2**mantissa_bits % 2**exponent_bits
        power = 2.0 ** (max(exponent, 1) - bias)
        value = (1 + mantissa) * power if exponent else mantissa * power
        table.append(-value if code >= 2 ** (exponent_bits + mantissa_bits) else value)
    return table


TABLES: dict[str, list[float]] = {
    **_INTEGERS,
    **_UNSIGNED,
    **{f"int{b}_narrow": _INTEGERS[f"int{b}"] for b in range(2, 9)},
    "int2_half": [-1.5, -0.5, 0.5, 1.5],
    **{f"int{b}_half": [v + 0.5 for v in _INTEGERS[f"int{b}"]] for b in range(3, 9)},
    "ternary": [-1, 0, 1, 2],
    "binary": [-1, 1],
    "fp4_e2m1": _E2M1 + [-v for v in _E2M1],
    "fp6_e2m3": _small_float(2, 3),
    "fp6_e3m2": _small_float(3, 2),
    "fp8_e4m3": _small_float(4, 3),
    "fp8_e5m2": _small_float(5, 2),
    # QLoRA (arXiv:2305.14314), appendix E.
    "nf4": [
        -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453,
        -0.28444138169288635, -0.18477343022823334, -0.09105003625154495, 0.0,
        0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224,
        0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0,
    ],
    # Zero and signed powers of two; the code that is left over repeats the last value.
    "pow2_3": [-1, -0.5, -0.25, 0, 0.25, 0.5, 1, 1],
    "pow2_4": [
        -1, -0.5, -0.25, -0.125, -0.0625, -0.03125, -0.015625, 0,
        0.015625, 0.03125, 0.0625, 0.125, 0.25, 0.5, 1, 1,
    ],
    # APoT (arXiv:1909.13144): one of 0, 1, 1/4, 1/16 plus one of 0, 1/2, 1/8, 1/32; in 32nds.
    "apot5": [
        n / 32
        for n in (
            -48, -36, -33, -32, -24, -18, -16, -12, -9, -8, -6, -4, -3, -2, -1, 0,
            1, 2, 3, 4, 6, 8, 9, 12, 16, 18, 24, 32, 33, 36, 48, 48,
        )
    ],
}  # fmt: skip
# Codes that no value encodes to: ternary's last, a narrow range's lowest, minus zeros, those that
# are NaN and infinities in OFP8, and a codebook's surplus.
UNUSED = {
    "ternary": {3},
    **{f"int{b}_narrow": {0} for b in range(2, 9)},
    "pow2_3": {7},
    "pow2_4": {15},
    "apot5": {31},
    "fp4_e2m1": {8},
    "fp6_e2m3": {0x20},
    "fp6_e3m2": {0x20},
    "fp8_e4m3": {0x80, 0x7F, 0xFF},
    "fp8_e5m2": {0x80, *range(0x7C, 0x80), *range(0xFC, 0x100)},
}


def test_every_format_has_a_table():
    assert {fmt.name for fmt in formats.ALL} == set(TABLES)


@pytest.mark.parametrize("fmt", formats.ALL, ids=lambda fmt: fmt.name)
def test_codes_stand_for_the_values_of_the_table(fmt):
    table = np.float32(TABLES[fmt.name])
    decoded = np.asarray(fmt.decode(jnp.arange(len(table), dtype=jnp.uint8)))
    np.testing.assert_array_equal(decoded, table)


@pytest.mark.parametrize("fmt", formats.ALL, ids=lambda fmt: fmt.name)
def test_values_of_the_table_round_to_themselves_and_encode_to_their_codes(fmt):
    table = np.float32(TABLES[fmt.name])
    unused = UNUSED.get(fmt.name, set())
    codes = np.array([c for c in range(len(table)) if c not in unused], np.uint8)
    values = jnp.asarray(table[codes])
    np.testing.assert_array_equal(fmt.encode(values), codes)
    np.testing.assert_array_equal(fmt.round(values), table[codes])


@pytest.mark.parametrize("fmt", formats.ALL, ids=lambda fmt: fmt.name)
def test_attributes_follow_from_the_table(fmt):
    used = [v for c, v in enumerate(TABLES[fmt.name]) if c not in UNUSED.get(fmt.name, set())]
    assert fmt.max == np.float32(max(abs(v) for v in used))
    assert fmt.half_range == (max(used) - min(used)) / 2
    assert len(TABLES[fmt.name]) == 2**fmt.bits
    zero = [c for c, v in enumerate(TABLES[fmt.name]) if v == 0]
    assert fmt.zero_code == (zero[0] if zero else 0)


def test_e2m1_rounds_ties_to_the_even_mantissa_and_saturates():
    ties = {0.25: 0, 0.75: 1, 1.25: 1, 1.75: 2, 2.5: 2, 3.5: 4, 5.0: 4, 7.0: 6, 1e30: 6}
    for v, rounded in ties.items():
        got = np.asarray(formats.FP4_E2M1.round(jnp.float32([v, -v])))
        np.testing.assert_array_equal(got, np.float32([rounded, -rounded]))


def test_e2m1_agrees_with_ml_dtypes_bit_for_bit():
    v = np.linspace(-8, 8, 4097, dtype=np.float32)  # steps of 1/256: every tie is hit
    theirs = v.astype(ml_dtypes.float4_e2m1fn)
    codes = np.asarray(formats.FP4_E2M1.encode(jnp.asarray(v)))
    negative_zero = theirs.view(np.uint8) == 8  # ours is always plus zero
    np.testing.assert_array_equal(codes, np.where(negative_zero, 0, theirs.view(np.uint8)))


@pytest.mark.parametrize(
    ("fmt", "dtype"),
    [
        (formats.FP6_E2M3, ml_dtypes.float6_e2m3fn),
        (formats.FP6_E3M2, ml_dtypes.float6_e3m2fn),
        (formats.FP8_E4M3, ml_dtypes.float8_e4m3fn),
        (formats.FP8_E5M2, ml_dtypes.float8_e5m2),
    ],
)
def test_fp6_and_fp8_agree_with_ml_dtypes_bit_for_bit(fmt, dtype):
    """Every positive half-way point between two values, and both its float32 neighbours."""
    largest = int(np.asarray(fmt.max, dtype).view(np.uint8))
    table = np.arange(largest + 1, dtype=np.uint8).view(dtype).astype(np.float32)
    middles = (table[1:] + table[:-1]) / 2
    v = np.concatenate([middles, np.nextafter(middles, 0), np.nextafter(middles, np.float32(1e9))])
    v = np.concatenate([v, -v])
    theirs = v.astype(dtype).view(np.uint8)
    codes = np.asarray(fmt.encode(jnp.asarray(v)))
    np.testing.assert_array_equal(codes, np.where(theirs == 1 << (fmt.bits - 1), 0, theirs))


@pytest.mark.parametrize(
    ("name", "v", "rounded"),
    [
        ("int4", [-9, -8.5, -7.5, -0.5, 0.5, 1.5, 2.5, 7.5], [-8, -8, -8, 0, 0, 2, 2, 7]),
        ("int4_narrow", [-9, -8, -7.5, 7.5], [-7, -7, -7, 7]),
        ("uint2", [-1, 0.5, 1.5, 2.5, 9], [0, 0, 2, 2, 3]),
        # Half-shifted levels: every integer is a tie, and goes up.
        ("int2_half", [-9, -1, -0.01, 0, -0.0, 1, 0.99], [-1.5, -0.5, -0.5, 0.5, 0.5, 1.5, 0.5]),
        ("ternary", [-1.5, -0.5, 0.5, 0.51, 9], [-1, 0, 0, 1, 1]),
        ("binary", [-0.1, -0.0, 0.0, 0.1], [-1, 1, 1, 1]),
        ("pow2_3", [-9, -0.375, 0.125, 0.126, 0.74, 0.76], [-1, -0.5, 0, 0.25, 0.5, 1]),
        ("int3_half", [-9, -3, -0.01, 0, 2.99, 3], [-3.5, -2.5, -0.5, 0.5, 2.5, 3.5]),
        ("nf4", [-2, 0.03979014977812767, 0.0398, 2], [-1, 0, 0.07958029955625534, 1]),
    ],
)
def test_ties_and_saturation(name, v, rounded):
    got = np.asarray(formats.get(name).round(jnp.float32(v)))
    np.testing.assert_array_equal(got, np.float32(rounded))
    assert not np.signbit(got[got == 0]).any(), "zero is always plus zero"
