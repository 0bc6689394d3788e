"""What all codecs share."""

import numpy as np
import pytest

from lowbit_jax import formats
from lowbit_jax.interop.codecs.parts import by_shape, codes_of, make_qtensor, stored_scales
from lowbit_jax.scale_formats import BFLOAT16, E4M3, E8M0, FLOAT16, FLOAT32
from lowbit_jax.spec import Block, PerChannel, PerGroup, PerTensor, QuantSpec

CASES = [
    (formats.INT4, PerGroup(8), FLOAT16),
    (formats.INT3, PerChannel(), BFLOAT16),
    (formats.UINT4, Block(8, 2), FLOAT16),
    (formats.INT2_HALF, PerTensor(), FLOAT32),
    (formats.NF4, PerGroup(8), FLOAT32),
    (formats.FP4_E2M1, PerGroup(8), E8M0),
    (formats.FP4_E2M1, PerGroup(8), E4M3),
    (formats.FP8_E4M3, PerChannel(), FLOAT32),
]


@pytest.mark.parametrize(("fmt", "granularity", "scale_format"), CASES)
def test_values_on_the_host_are_those_of_the_qtensor(kernels, fmt, granularity, scale_format):
    """Bit for bit, padding of K, row orders and all."""
    spec = QuantSpec(
        format=fmt,
        granularity=granularity,
        symmetric=fmt.name != "uint4",
        scale_format=scale_format,
    )
    kernel = kernels.random(spec, (40, 6), 0, permuted=granularity == PerGroup(8))
    values = np.asarray(kernel.qtensor.dequantize())
    mine = kernel.dequantize()
    if kernel.input_permutation is not None:
        mine = mine[kernel.input_permutation]
    np.testing.assert_array_equal(mine, values)
    np.testing.assert_array_equal(codes_of(kernel.qtensor), kernel.qtensor.codes())


@pytest.mark.parametrize(
    ("scale", "wanted"),
    [
        ((1, 1), PerTensor()),
        ((1, 6), PerChannel()),
        ((4, 6), PerGroup(8)),
        ((4, 3), Block(8, 2)),
        ((1, 3), Block(None, 2)),
        ((4, 1), Block(8, None)),
    ],
)
def test_granularity_follows_from_the_shape_of_the_scales(scale, wanted):
    assert by_shape(32, 6, scale, "w") == wanted
    assert QuantSpec(format=formats.INT4, granularity=wanted).scale_shape((32, 6)) == scale


def test_scales_are_rounded_once_and_none_is_lost():
    scale = np.float32([1 + 2.0**-11, 3 * 2.0**-25, -0.1, 0])
    stored = stored_scales(scale, FLOAT16, "w")
    np.testing.assert_array_equal(stored, np.float16([1, 2.0**-23, -0.1, 0]))
    for value in (70000, 2.0**-26):
        with pytest.raises(ValueError, match=r"w: 1 of 1 scales have no float16 value.*float16 fr"):
            stored_scales(np.float32([value]), FLOAT16, "w")


def test_codes_that_stand_for_nothing_are_refused():
    for fmt, code in ((formats.TERNARY, 3), (formats.FP8_E4M3, 0xFF), (formats.FP8_E5M2, 0x7C)):
        spec, codes = QuantSpec(format=fmt), np.zeros((8, 1), np.uint8)
        codes[3] = code
        with pytest.raises(ValueError, match=f"w: 1 of 8 codes stand for no value of {fmt.name}"):
            make_qtensor(codes, spec, np.ones((1, 1), np.float32), where="w")
