"""AWQ's tensors against a reader of the layout, one scalar at a time."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lowbit_jax import formats
from lowbit_jax.interop.codecs import awq, gptq
from lowbit_jax.interop.codecs.parts import DoesNotFit, Kernel
from lowbit_jax.scale_formats import FLOAT16
from lowbit_jax.spec import PerChannel, PerGroup, QuantSpec


def spec(symmetric, granularity=PerGroup(16)):
    fmt = formats.INT4 if symmetric else formats.UINT4
    return QuantSpec(format=fmt, granularity=granularity, symmetric=symmetric, scale_format=FLOAT16)


def plain_reader(tensors, group):
    """W[k, n]: nibble i of word c holds column 8 c + order[i]."""
    order = [0, 2, 4, 6, 1, 3, 5, 7]

    def value(words, row, n):
        return (int(words[row, n // 8]) % 2**32 >> (4 * order.index(n % 8))) & 15

    k, n = tensors["qweight"].shape[0], tensors["scales"].shape[1]
    w = np.empty((k, n), np.float32)
    for i in range(k):
        for j in range(n):
            z = value(tensors["qzeros"], i // group, j)
            w[i, j] = np.float32(tensors["scales"][i // group, j]) * (
                value(tensors["qweight"], i, j) - z
            )
    return w


@settings(max_examples=15)
@given(
    symmetric=st.booleans(),
    group=st.sampled_from([None, 5, 30]),
    n=st.sampled_from([8, 24]),
    seed=st.integers(0, 2**32 - 1),
)
def test_round_trip_and_a_plain_reader(kernels, symmetric, group, n, seed):
    granularity = PerChannel() if group is None else PerGroup(group)
    kernel = kernels.random(spec(symmetric, granularity), (60, n), seed)
    tensors = awq.encode(kernel, where="layer")
    back = awq.decode(tensors, where="layer")
    kernels.assert_same(back, kernel)
    kernels.assert_same_bytes(awq.encode(back, where="layer"), tensors)
    np.testing.assert_array_equal(back.dequantize(), plain_reader(tensors, group or 60))


def test_the_word_of_the_page():
    """Columns 0 to 7 with the codes 0 to 7 are the word 0x75316420."""
    tensors = {
        "qweight": np.full((1, 1), 0x75316420, np.uint32).view(np.int32),
        "qzeros": np.zeros((1, 1), np.int32),
        "scales": np.ones((1, 8), np.float16),
    }
    np.testing.assert_array_equal(awq.decode(tensors, where="").dequantize(), [np.arange(8)])


def test_to_gptq_and_back_is_lossless(kernels):
    kernel = kernels.random(spec(False), (64, 32), 0)
    through = gptq.decode(
        gptq.encode(kernel, version=1, where=""), bits=4, version=1, symmetric=False, where=""
    )
    kernels.assert_same_bytes(awq.encode(through, where=""), awq.encode(kernel, where=""))


def test_what_it_cannot_hold_is_refused(kernels):
    eight = kernels.random(QuantSpec(format=formats.INT8), (64, 8), 0)
    with pytest.raises(NotImplementedError, match=r"AWQ cannot hold int8 per channel.*w4a16_g128"):
        awq.encode(eight, where="layer")
    kernel = kernels.random(spec(True), (64, 8), 0)
    order = Kernel(kernel.qtensor, np.arange(64, dtype=np.int32)[::-1])
    with pytest.raises(NotImplementedError, match=r"no activation order.*or GPTQ"):
        awq.encode(order, where="layer")
    with pytest.raises(DoesNotFit, match=r"layer: 12 outputs do not fill"):
        awq.encode(kernels.random(spec(True), (64, 12), 0), where="layer")


@pytest.mark.parametrize(
    ("name", "change", "message"),
    [
        ("scales", lambda t: t[:, :-1], r"scales is float16 \(4, 7\), and not"),
        ("qzeros", lambda t: t[:-1], r"qzeros is int32 \(3, 1\)"),
        ("qweight", lambda t: t.view(np.float32), r"qweight is float32"),
        ("scales", lambda t: t * np.float16(np.inf), r"NaN or infinite"),
    ],
)
def test_damage_is_named(kernels, name, change, message):
    tensors = awq.encode(kernels.random(spec(False), (64, 8), 0), where="layer")
    with np.errstate(invalid="ignore"):
        changed = tensors | {name: change(tensors[name])}
    with pytest.raises(ValueError, match=f"layer.*{message}"):
        awq.decode(changed, where="layer")
