"""Stretched positions divide each frequency as their papers say."""

import numpy as np
import pytest

from lowbit_jax.interop.rotary import linear_factors, llama3_factors


def test_llama3_leaves_short_waves_and_stretches_long_ones():
    theta, head, old, factor, low, high = 500000.0, 128, 8192, 8.0, 1.0, 4.0
    got = llama3_factors(head, theta, factor=factor, low=low, high=high, original=old)
    want = []  # in wavelengths, as Meta's code has it, one frequency at a time
    for i in range(head // 2):
        frequency = theta ** (-2 * i / head)
        wavelength = 2 * np.pi / frequency
        if wavelength < old / high:
            new = frequency
        elif wavelength > old / low:
            new = frequency / factor
        else:
            smooth = (old / wavelength - low) / (high - low)
            new = (1 - smooth) * frequency / factor + smooth * frequency
        want.append(frequency / new)
    # A dozen float64 operations in another order.
    np.testing.assert_allclose(got, want, rtol=12 * np.finfo(np.float64).eps * 8)
    assert got[0] == 1
    assert got[-1] == factor
    assert any(1 < value < factor for value in got)


def test_linear_divides_all():
    assert linear_factors(4, 6) == (4.0, 4.0, 4.0)


@pytest.mark.parametrize("wrong", [{"factor": 0}, {"low": 4.0}, {"low": -1.0}, {"theta": 0.5}])
def test_numbers_that_make_no_sense_are_named(wrong):
    good = {"theta": 1e4, "factor": 8.0, "low": 1.0, "high": 4.0, "original": 8192}
    with pytest.raises(ValueError, match=r"llama3: factor=.*are needed"):
        llama3_factors(8, **good | wrong)
