"""GGUF's blocks against the `gguf` package, and readers of the page."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lowbit_jax import formats
from lowbit_jax.interop.codecs import ggml_blocks
from lowbit_jax.interop.codecs.parts import DoesNotFit
from lowbit_jax.interop.ggml_quantize import QUANTIZED, quantize_rows
from lowbit_jax.scale_formats import FLOAT16, FLOAT32
from lowbit_jax.spec import PerChannel, PerGroup, PerTensor, QuantSpec

gguf = pytest.importorskip("gguf", reason="the gguf package (dependency group dev) is not here")


def number(type):
    return getattr(gguf.GGMLQuantizationType, type)


@st.composite
def matrices(draw):
    """Rows of many magnitudes, among them zeros, ternary values and ties of every rounding."""
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    x = rng.normal(size=(6, 512)) * 2 ** rng.uniform(-20, 10, (6, 1))
    x[0] = rng.integers(-1, 2, 512) * 2.0 ** rng.integers(-8, 8)
    x[1, :256] = 0
    x[2] = rng.integers(-16, 17, 512) / 2  # halves: ties
    return x.astype(np.float32)


@settings(max_examples=40)
@given(x=matrices())
@pytest.mark.parametrize("type", QUANTIZED)
def test_rounding_agrees_with_ggml_byte_for_byte(type, x):
    wanted = gguf.quants.quantize(x, number(type)).reshape(-1)
    np.testing.assert_array_equal(quantize_rows(x, type, where="x"), wanted)


@settings(max_examples=10)
@given(x=matrices())
@pytest.mark.parametrize("type", ggml_blocks.BLOCK_TYPES)
def test_blocks_of_ggml_keep_their_bytes_and_values(kernels, type, x):
    data = gguf.quants.quantize(x, number(type)).reshape(-1)
    kernel = ggml_blocks.decode(data, x.shape, type, where="t")
    wanted = gguf.quants.dequantize(data, number(type)).reshape(x.shape)
    np.testing.assert_array_equal(kernel.dequantize().T, wanted)
    np.testing.assert_array_equal(ggml_blocks.dequantize(data, type).reshape(x.shape), wanted)
    np.testing.assert_array_equal(ggml_blocks.encode(kernel, type, where="t"), data)


@settings(max_examples=10)
@given(
    size=st.sampled_from([1, 2, 4]),
    n=st.integers(1, 9),
    seed=st.integers(0, 2**32 - 1),
)
@pytest.mark.parametrize("type", ggml_blocks.BLOCK_TYPES)
def test_our_kernels_come_back_also_from_longer_groups(kernels, type, size, n, seed):
    kind = ggml_blocks.BLOCK_TYPES[type]
    spec = QuantSpec(
        format=kind.format,
        granularity=PerGroup(kind.elements * size),
        scale_format=kind.scale_format,
    )
    kernel = kernels.random(spec, (kind.elements * 4, n), seed)
    data = ggml_blocks.encode(kernel, type, where="t")
    assert data.size == n * 4 * kind.size
    back = ggml_blocks.decode(data, (n, kind.elements * 4), type, where="t")
    kernels.assert_same(back, kernel, spec=size == 1)


@pytest.mark.parametrize(
    ("name", "granularity", "types"),
    [
        ("ternary", PerTensor(), ("TQ1_0", "TQ2_0", "Q4_0", "Q8_0")),
        ("int2", PerChannel(), ("Q4_0", "Q8_0")),
        ("int3", PerGroup(32), ("Q4_0", "Q8_0")),
        ("int4_narrow", PerGroup(64), ("Q4_0", "Q8_0")),
        ("binary", PerChannel(), ("Q4_0", "Q8_0")),
        ("int5", PerChannel(), ("Q8_0",)),
    ],
)
def test_wider_types_hold_the_same_integers(kernels, name, granularity, types):
    spec = QuantSpec(format=formats.get(name), granularity=granularity, scale_format=FLOAT16)
    assert ggml_blocks.types_for(spec) == types
    kernel = kernels.random(spec, (256, 3), 0)
    for type in types:
        data = ggml_blocks.encode(kernel, type, where="t")
        back = ggml_blocks.decode(data, (3, 256), type, where="t")
        np.testing.assert_array_equal(back.dequantize(), kernel.dequantize())


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        (QuantSpec(format=formats.UINT4, symmetric=False), "uint4 per channel: .*w4a16_g32"),
        (QuantSpec(format=formats.NF4), "nf4 per channel"),
        (QuantSpec(format=formats.INT2_HALF), "int2_half per channel"),
        (QuantSpec(format=formats.INT4, granularity=PerGroup(16)), "blocks of 32 are no part of"),
    ],
)
def test_what_it_cannot_hold_is_refused(spec, message):
    with pytest.raises(NotImplementedError, match=f"GGUF cannot hold .*{message}"):
        ggml_blocks.types_for(spec)


def test_rows_that_are_no_whole_blocks_do_not_fit(kernels):
    spec = QuantSpec(format=formats.INT4, granularity=PerChannel(), scale_format=FLOAT32)
    with pytest.raises(DoesNotFit, match="t: rows of 172 in groups of 172 are no whole blocks"):
        ggml_blocks.encode(kernels.random(spec, (172, 2), 0), "Q4_0", where="t")
    with pytest.raises(ValueError, match="x: rows of 172 are no whole blocks of 256"):
        quantize_rows(np.ones((1, 172), np.float32), "TQ1_0", where="x")


@pytest.mark.parametrize("value", [np.nan, np.inf, 1e9])
def test_values_without_a_scale_are_refused(value):
    x = np.ones((1, 256), np.float32)
    x[0, 7] = value
    with pytest.raises(ValueError, match="x: values are NaN, infinite, or beyond"):
        quantize_rows(x, "TQ2_0", where="x")


def test_damaged_blocks_are_named():
    data = np.zeros(66, np.uint8)
    data[0] = 3
    with pytest.raises(ValueError, match="t: 1 of 256 codes stand for no value of ternary"):
        ggml_blocks.decode(data, (1, 256), "TQ2_0", where="t")
    data[0], data[65] = 0, 0x7C  # infinity
    with pytest.raises(ValueError, match="t: the scales hold 1 of 1 values"):
        ggml_blocks.decode(data, (1, 256), "TQ2_0", where="t")
