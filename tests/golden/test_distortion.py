"""The error of scalar formats on normal values is that of Max (1960)."""

import pytest

from lowbit_jax import formats
from lowbit_jax.reporting.distortion import (
    MAX_NONUNIFORM,
    MAX_UNIFORM,
    distortion_table,
    levels_of,
    normal_distortion,
    rate_limit,
)

CASES = [
    (formats.BINARY, MAX_UNIFORM[2]),
    (formats.INT2_HALF, MAX_UNIFORM[4]),
    (formats.INT3_HALF, MAX_UNIFORM[8]),
    (formats.INT4_HALF, MAX_UNIFORM[16]),
    *((formats.normal_codebook(n), MAX_NONUNIFORM[n]) for n in (4, 8, 16)),
]


def _check(fmt, expected, samples):
    error, _ = normal_distortion(fmt, samples=samples)
    # The issue's 1 %; the samples' own deviation is below 0.3 % at 2**20 (the error of 16 levels
    # has a relative deviation of about 2 an element, and there are 2**10 of the root).
    assert abs(error / expected - 1) < 0.01
    assert error > rate_limit(fmt.bits)


@pytest.mark.parametrize(("fmt", "expected"), CASES, ids=lambda v: getattr(v, "name", ""))
def test_distortion_is_that_of_max_within_one_percent(fmt, expected):
    _check(fmt, expected, 2**20)


@pytest.mark.slow
@pytest.mark.parametrize(("fmt", "expected"), CASES, ids=lambda v: getattr(v, "name", ""))
def test_distortion_is_that_of_max_on_all_samples(fmt, expected):
    _check(fmt, expected, 2**22)


def test_lloyds_values_are_those_that_max_printed():
    # Max (1960), table I: the positive output levels.
    expected = {2: [0.7980], 4: [0.4528, 1.510], 8: [0.2451, 0.7560, 1.344, 2.152]}
    for levels, values in expected.items():
        got = formats.normal_codebook(levels).values[levels // 2 :]
        assert got == pytest.approx(values, abs=6e-4)  # four printed digits
    with pytest.raises(ValueError, match="levels=1 "):
        formats.normal_codebook(1)


def test_the_scale_found_is_maxs_step():
    # Table II: equidistant levels 0.9957 apart for four of them.
    _, scale = normal_distortion(formats.INT2_HALF, samples=2**18)
    assert scale == pytest.approx(0.9957, rel=0.02)


def test_the_table_has_a_line_per_format_and_its_limit():
    table = distortion_table([formats.TERNARY, formats.NF4], samples=2**15)
    header, rule, ternary, nf4 = table.splitlines()
    assert header.count("|") == rule.count("|") == ternary.count("|") == 9
    assert ternary.startswith("| ternary | 2 | 3 |")
    assert nf4.startswith("| nf4 | 4 | 16 |")
    assert "0.003906" in nf4  # 2**-8
    assert levels_of(formats.FP4_E2M1) == 15  # one zero


def test_unsigned_formats_are_pointed_to_their_half_shifted_twins():
    with pytest.raises(ValueError, match="int4_half"):
        normal_distortion(formats.UINT4)
