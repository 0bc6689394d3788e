"""compressed-tensors' layouts against a reader of the page, one scalar at a time."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lowbit_jax import formats
from lowbit_jax.interop.codecs import compressed_tensors as ct
from lowbit_jax.scale_formats import BFLOAT16, FLOAT16, FLOAT32
from lowbit_jax.spec import Block, PerChannel, PerGroup, PerTensor, QuantSpec


def spec(bits, symmetric=True, granularity=PerGroup(16), scale_format=BFLOAT16):
    fmt = formats.get(f"{'int' if symmetric else 'uint'}{bits}")
    return QuantSpec(
        format=fmt, granularity=granularity, symmetric=symmetric, scale_format=scale_format
    )


def fields(words, bits, count, padded):
    """The first codes of a row of words."""
    words = [int(word) % 2**32 for word in words]
    if padded:
        per = 32 // bits
        return [(words[i // per] >> (bits * (i % per))) % 2**bits for i in range(count)]
    stream = sum(word << (32 * i) for i, word in enumerate(words))
    return [(stream >> (bits * i)) % 2**bits for i in range(count)]


def plain_reader(tensors, bits, padded):
    """W[n, k] = (q - z) s, with q and z stored plus 2**(bits - 1), z packed along the outputs."""
    n, k = tensors["weight_shape"]
    scale = tensors["weight_scale"].astype(np.float32)
    half, groups = 2 ** (bits - 1), scale.shape[1]
    g_idx = tensors.get("weight_g_idx", np.arange(k) // (k // groups))
    zeros = np.zeros((n, groups), int)
    if "weight_zero_point" in tensors:
        columns = tensors["weight_zero_point"].T
        zeros = np.array([fields(column, bits, n, padded) for column in columns]).T - half
    w = np.empty((n, k), np.float32)
    for i in range(n):
        codes = fields(tensors["weight_packed"][i], bits, k, padded)
        for j in range(k):
            g = g_idx[j]
            w[i, j] = np.float32(codes[j] - half - zeros[i, g]) * scale[i, g]
    return w


def encode(kernel, format=ct.PACKED, padded=False, scale_format=BFLOAT16):
    return ct.encode(kernel, format=format, where="w", padded=padded, scale_format=scale_format)


@settings(max_examples=25)
@given(
    bits=st.sampled_from([2, 3, 4, 8]),
    symmetric=st.booleans(),
    padded=st.booleans(),
    permuted=st.booleans(),
    group=st.sampled_from([None, 8, 32]),
    shape=st.sampled_from([(64, 6), (96, 33), (64, 32)]),
    seed=st.integers(0, 2**32 - 1),
)
def test_packed_round_trip(kernels, bits, symmetric, padded, permuted, group, shape, seed):
    granularity = PerChannel() if group is None else PerGroup(group)
    permuted = permuted and group is not None
    kernel = kernels.random(spec(bits, symmetric, granularity), shape, seed, permuted=permuted)
    tensors = encode(kernel, padded=padded)
    back = ct.decode(tensors, format=ct.PACKED, bits=bits, where="w")
    kernels.assert_same(back, kernel)
    kernels.assert_same_bytes(encode(back, padded=padded), tensors)


@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize(("bits", "symmetric"), [(3, False), (4, True), (4, False), (8, False)])
def test_a_plain_reader_sees_the_same_weights(kernels, bits, symmetric, padded):
    kernel = kernels.random(spec(bits, symmetric), (32, 20), 1, permuted=True)
    tensors = encode(kernel, padded=padded)
    wanted = plain_reader(tensors, bits, padded).T
    np.testing.assert_array_equal(kernel.dequantize(), wanted)
    back = ct.decode(tensors, format=ct.PACKED, bits=bits, where="w")
    np.testing.assert_array_equal(back.dequantize(), wanted)


@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("k", [20, 40, 64, 100])
def test_the_age_of_three_bit_words_is_seen(kernels, k, padded):
    """At 20, 40 and 100 both layouts take the same number of words; the last bits tell."""
    kernel = kernels.random(spec(3, True, PerChannel()), (k, 12), k)
    tensors = encode(kernel, padded=padded)
    assert ct.is_padded(tensors["weight_packed"], 3, k, "w") == padded
    back = ct.decode(tensors, format=ct.PACKED, bits=3, where="w")
    kernels.assert_same(back, kernel)


@pytest.mark.parametrize("granularity", [PerTensor(), PerChannel(), PerGroup(16), Block(16, 4)])
@pytest.mark.parametrize("symmetric", [True, False])
def test_unpacked_integers(kernels, granularity, symmetric):
    kernel = kernels.random(spec(8, symmetric, granularity, FLOAT32), (32, 12), 0)
    tensors = encode(kernel, ct.INTEGER, scale_format=FLOAT32)
    assert tensors["weight"].dtype == np.int8
    back = ct.decode(tensors, format=ct.INTEGER, bits=8, where="w")
    kernels.assert_same(back, kernel)
    kernels.assert_same_bytes(encode(back, ct.INTEGER, scale_format=FLOAT32), tensors)
    if symmetric and granularity == PerChannel():
        wanted = tensors["weight"].astype(np.float32) * tensors["weight_scale"]
        np.testing.assert_array_equal(back.dequantize().T, wanted)


@pytest.mark.parametrize("granularity", [PerTensor(), PerChannel(), Block(16, 4)])
def test_unpacked_floats(kernels, granularity):
    wanted = QuantSpec(format=formats.FP8_E4M3, granularity=granularity, scale_format=FLOAT16)
    kernel = kernels.random(wanted, (32, 12), 0)
    tensors = encode(kernel, ct.FLOAT, scale_format=FLOAT16)
    back = ct.decode(tensors, format=ct.FLOAT, bits=8, where="w")
    kernels.assert_same(back, kernel)
    kernels.assert_same_bytes(encode(back, ct.FLOAT, scale_format=FLOAT16), tensors)
    scale = tensors["weight_scale"].astype(np.float32)
    if granularity != PerTensor():
        scale = scale.repeat(12 // scale.shape[0], 0).repeat(32 // scale.shape[1], 1)
    plain = tensors["weight"].astype(np.float32) * scale
    np.testing.assert_array_equal(back.dequantize().T, plain)


def test_what_it_cannot_hold_is_refused(kernels):
    nf4 = kernels.random(QuantSpec(format=formats.NF4), (32, 8), 0)
    with pytest.raises(NotImplementedError, match=r"pack-quantized cannot hold nf4.*w4a16_g128"):
        encode(nf4)
    with pytest.raises(NotImplementedError, match=r"float-quantized cannot hold int4"):
        encode(kernels.random(spec(4), (32, 8), 0), ct.FLOAT)
    permuted = kernels.random(spec(8), (32, 8), 0, permuted=True)
    with pytest.raises(NotImplementedError, match=r"int-quantized .*activation order"):
        encode(permuted, ct.INTEGER)


@pytest.mark.parametrize(
    ("name", "change", "message"),
    [
        ("weight_shape", lambda t: t * 0, r"weight_shape is \[0, 0\]"),
        ("weight_shape", lambda t: t + 1, r"weight_packed has 8 rows, weight_shape says 9"),
        ("weight_packed", lambda t: t[:, :-1], r"3 words a row do not hold 32 codes"),
        ("weight_scale", lambda t: t[:, :0], r"scales of shape \(8, 0\) do not divide"),
        ("weight_scale", lambda t: t[:5], r"scales of shape \(5, 2\) do not divide"),
        ("weight_zero_point", lambda t: t[:0], r"weight_zero_point is int32 \(0, 2\)"),
        ("weight_scale", lambda t: t.view(np.int16), r"the scales are int16"),
    ],
)
def test_damage_is_named(kernels, name, change, message):
    tensors = encode(kernels.random(spec(4, False), (32, 8), 0))
    with pytest.raises(ValueError, match=message):
        ct.decode(tensors | {name: change(tensors[name])}, format=ct.PACKED, bits=4, where="w")


def test_integers_beyond_their_width_are_damage():
    tensors = {"weight": np.full((4, 8), 9, np.int8), "weight_scale": np.ones((4, 1), np.float32)}
    with pytest.raises(ValueError, match="integers beyond 4 bits"):
        ct.decode(tensors, format=ct.INTEGER, bits=4, where="w")
