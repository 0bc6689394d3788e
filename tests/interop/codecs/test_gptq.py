"""GPTQ's tensors against a reader of the layout, one scalar at a time."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import lowbit_jax as lb
from lowbit_jax import formats
from lowbit_jax.interop.codecs import gptq
from lowbit_jax.interop.codecs.parts import DoesNotFit, Kernel, make_qtensor
from lowbit_jax.scale_formats import FLOAT16
from lowbit_jax.spec import Block, PerChannel, PerGroup, PerTensor, QuantSpec

K, N = 64, 32


def field(words, index, bits):
    """Code `index` of a list of 32-bit words that are one stream, lowest bits first."""
    stream = sum(int(word) % 2**32 << (32 * i) for i, word in enumerate(words))
    return (stream >> (bits * index)) % 2**bits


def plain_reader(tensors, bits, version):
    """W[k, n], from the layout page alone."""
    g_idx, scales = tensors["g_idx"], tensors["scales"]
    k, n = len(g_idx), scales.shape[1]
    w = np.empty((k, n), np.float32)
    for j in range(n):
        zeros = [field(row, j, bits) for row in tensors["qzeros"]]
        for i in range(k):
            z = (zeros[g_idx[i]] + (version == 1)) % 2**bits
            w[i, j] = np.float32(scales[g_idx[i], j]) * (
                field(tensors["qweight"][:, j], i, bits) - z
            )
    return w


def spec(bits, symmetric=True, granularity=PerGroup(16)):
    fmt = formats.get(f"{'int' if symmetric else 'uint'}{bits}")
    return QuantSpec(format=fmt, granularity=granularity, symmetric=symmetric, scale_format=FLOAT16)


def decoded(tensors, bits, version, symmetric):
    return gptq.decode(tensors, bits=bits, version=version, symmetric=symmetric, where="layer")


@settings(max_examples=25)
@given(
    bits=st.sampled_from(gptq.BITS),
    version=st.sampled_from([1, 2]),
    symmetric=st.booleans(),
    group=st.sampled_from([None, 16, 32]),
    permuted=st.booleans(),
    shape=st.sampled_from([(K, N), (64, 96), (96, 64)]),
    seed=st.integers(0, 2**32 - 1),
)
def test_round_trip(kernels, bits, version, symmetric, group, permuted, shape, seed):
    granularity = PerChannel() if group is None else PerGroup(group)
    permuted = permuted and group is not None
    kernel = kernels.random(spec(bits, symmetric, granularity), shape, seed, permuted=permuted)
    tensors = gptq.encode(kernel, version=version, where="layer")
    back = decoded(tensors, bits, version, symmetric)
    in_order = permuted and (np.diff(kernel.input_permutation) > 0).all()
    kernels.assert_same(back, Kernel(kernel.qtensor) if in_order else kernel)
    kernels.assert_same_bytes(gptq.encode(back, version=version, where="layer"), tensors)


@pytest.mark.parametrize("version", [1, 2])
@pytest.mark.parametrize("bits", gptq.BITS)
def test_a_plain_reader_sees_the_same_weights(kernels, bits, version):
    kernel = kernels.random(spec(bits, symmetric=False), (K, N), bits, permuted=True)
    tensors = gptq.encode(kernel, version=version, where="layer")
    wanted = plain_reader(tensors, bits, version)
    np.testing.assert_array_equal(kernel.dequantize(), wanted)
    np.testing.assert_array_equal(decoded(tensors, bits, version, False).dequantize(), wanted)


def test_symmetric_zeros_are_the_constants_of_the_page(kernels):
    kernel = kernels.random(spec(4), (K, N), 0)
    for version, word in ((1, 0x77777777), (2, 0x88888888)):
        qzeros = gptq.encode(kernel, version=version, where="layer")["qzeros"]
        assert (qzeros.view(np.uint32) == word).all()


@pytest.mark.parametrize(("written", "label"), [(1, 2), (2, 1)])
def test_a_wrong_label_is_seen_in_the_zeros_and_said(kernels, written, label):
    kernel = kernels.random(spec(4), (K, N), 0)
    tensors = gptq.encode(kernel, version=written, where="layer")
    with pytest.warns(
        UserWarning, match=rf"layer: .*version {label}, .* those of version {written}"
    ):
        back = decoded(tensors, 4, label, True)
    kernels.assert_same(back, kernel)


def test_zeros_that_are_no_convention_are_refused(kernels):
    tensors = gptq.encode(kernels.random(spec(4, False), (K, N), 0), version=2, where="layer")
    with pytest.raises(ValueError, match=r"layer: .* middle of the range, 8 .* and they are \["):
        decoded(tensors, 4, 2, True)


@pytest.mark.parametrize("granularity", [PerTensor(), Block(16, 8)])
def test_shared_scales_are_written_out(kernels, granularity):
    kernel = kernels.random(spec(4, granularity=granularity), (K, N), 0)
    back = decoded(gptq.encode(kernel, version=2, where="layer"), 4, 2, True)
    kernels.assert_same(back, kernel, spec=False)


def test_ternary_codes_fit_two_bits_with_a_zero_of_one(kernels):
    ternary = QuantSpec(format=formats.TERNARY, granularity=PerGroup(16), scale_format=FLOAT16)
    kernel = kernels.random(ternary, (K, N), 0)
    back = decoded(gptq.encode(kernel, version=1, where="layer"), 2, 1, False)
    assert back.qtensor.spec.format is lb.UINT2
    kernels.assert_same(back, kernel, spec=False)


def test_what_it_cannot_hold_is_refused_with_the_nearest(kernels):
    nf4 = kernels.random(QuantSpec(format=formats.NF4, granularity=PerGroup(16)), (K, N), 0)
    with pytest.raises(NotImplementedError, match=r"GPTQ cannot hold nf4 in groups.*w4a16_g128"):
        gptq.encode(nf4, version=2, where="layer")
    five = QuantSpec(format=formats.INT5)
    with pytest.raises(NotImplementedError, match=r"GPTQ cannot hold int5"):
        gptq.encode(kernels.random(five, (K, N), 0), version=2, where="layer")
    with pytest.raises(DoesNotFit, match=r"layer: 172 x 32 codes of 4 bits do not end"):
        gptq.encode(
            kernels.random(spec(4, True, PerGroup(4)), (172, N), 0), version=2, where="layer"
        )
    scales = np.full((1, N), 1e-30, np.float32)
    codes, int4 = np.zeros((K, N), np.uint8), QuantSpec(format=formats.INT4)
    tiny = Kernel(make_qtensor(codes, int4, scales, where="tiny"))
    with pytest.raises(ValueError, match=r"32 of 32 scales have no float16 value"):
        gptq.encode(tiny, version=2, where="layer")


def wrong(name, value):
    return lambda tensors: tensors | {name: value(tensors[name])}


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        (lambda t: {k: v for k, v in t.items() if k != "qzeros"}, ValueError, "qzeros is missing"),
        (wrong("qzeros", lambda z: z[:, :-1]), ValueError, r"qzeros is int32 \(4, 3\), and not"),
        (wrong("qweight", lambda w: w.astype(np.int64)), ValueError, "qweight is int64"),
        (wrong("scales", lambda s: s[:3]), ValueError, "qzeros is"),
        (wrong("scales", lambda s: s * np.float16(np.nan)), ValueError, "128 of 128 values"),
        (wrong("g_idx", lambda g: g + 1), ValueError, r"outside \[0, 4\)"),
        (wrong("g_idx", lambda g: g * 0), NotImplementedError, "groups of several lengths"),
    ],
)
def test_damage_is_named(kernels, change, error, message):
    tensors = gptq.encode(kernels.random(spec(4, False), (K, N), 0), version=2, where="layer")
    with pytest.raises(error, match=f"layer: .*{message}"):
        decoded(change(tensors), 4, 2, False)


def test_other_widths_are_refused(kernels):
    with pytest.raises(NotImplementedError, match=r"layer: GPTQ with 5 bits; known are \[2, 3"):
        decoded({}, 5, 1, True)
