"""qwix's arrays of the same values, bit for bit."""

import jax.numpy as jnp
import numpy as np
import pytest

import lowbit_jax as lb
from lowbit_jax import formats
from lowbit_jax.interop import from_qarray, to_qarray
from lowbit_jax.scale_formats import E4M3, E8M0, FLOAT16
from lowbit_jax.spec import Block, PerChannel, PerGroup, PerTensor, QuantSpec

qwix = pytest.importorskip("qwix", reason="qwix (the extra bench) is not installed")

X = np.random.default_rng(0).normal(size=(2, 64, 6)).astype(np.float32)
SAME = [
    QuantSpec(format=formats.INT4, granularity=PerGroup(16)),
    QuantSpec(format=formats.INT8, granularity=Block(16, 2), scale_format=FLOAT16),
    QuantSpec(format=formats.UINT4, granularity=PerGroup(16), symmetric=False),
    QuantSpec(format=formats.FP8_E4M3, granularity=PerChannel()),
]
VALUES = [
    QuantSpec(format=formats.TERNARY, granularity=PerTensor()),
    QuantSpec(format=formats.INT3),
    QuantSpec(format=formats.UINT3, symmetric=False),
    QuantSpec(format=formats.FP4_E2M1, granularity=PerGroup(16), scale_format=E4M3),
    QuantSpec(format=formats.FP4_E2M1, granularity=PerGroup(32), scale_format=E8M0),
]


@pytest.mark.parametrize("spec", SAME + VALUES, ids=QuantSpec.describe)
def test_values_are_the_same_there_and_back(spec):
    q = lb.quantize(X, spec)
    array = to_qarray(q)
    assert array.shape == q.shape
    np.testing.assert_array_equal(qwix.dequantize(array), q.dequantize())
    back = from_qarray(array)
    np.testing.assert_array_equal(back.dequantize(), q.dequantize())
    if spec in SAME:
        assert (back.spec.format, back.spec.granularity) == (spec.format, spec.granularity)
        np.testing.assert_array_equal(back.codes(), q.codes())


def test_arrays_that_qwix_made_come_in():
    array = qwix.quantize(jnp.asarray(X[0]), jnp.int8, channelwise_axes=[1])
    q = from_qarray(array)
    assert q.spec.granularity == PerChannel()
    np.testing.assert_array_equal(q.dequantize(), qwix.dequantize(array))


def test_what_has_no_counterpart_is_refused():
    with pytest.raises(NotImplementedError, match=r"has no nf4 .*integers"):
        to_qarray(lb.quantize(X, QuantSpec(format=formats.NF4)))
    with pytest.raises(NotImplementedError, match=r"values int16"):
        from_qarray(qwix.QArray(jnp.ones((2, 2), jnp.int16), jnp.ones((1, 1))))
    with pytest.raises(ValueError, match=r"shape \(2,\) is no matrix"):
        from_qarray(qwix.QArray(jnp.ones((2,), jnp.int8), jnp.ones((1,))))
