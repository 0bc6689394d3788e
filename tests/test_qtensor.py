import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lowbit_jax import formats, packing, testing
from lowbit_jax.qtensor import QTensor, quantize
from lowbit_jax.scale_formats import BFLOAT16, E4M3, FLOAT16
from lowbit_jax.spec import PerChannel, PerGroup, PerTensor, PerToken, QuantSpec

pytestmark = pytest.mark.usefixtures("strict_dtypes")

INT4 = QuantSpec(format=formats.INT4, granularity=PerGroup(16))
UINT3 = QuantSpec(format=formats.UINT3, symmetric=False, scale_format=FLOAT16)
NVFP4 = QuantSpec(format=formats.FP4_E2M1, granularity=PerGroup(16), scale_format=E4M3)
TOKENS = QuantSpec(format=formats.INT8_NARROW, granularity=PerToken(16))


def _x(shape=(64, 32), seed=0, dtype=jnp.float32):
    return jnp.asarray(testing.awkward_array(shape, seed), dtype)


@pytest.mark.parametrize("spec", [INT4, UINT3, NVFP4, TOKENS], ids=lambda s: s.format.name)
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16, jnp.float16])
def test_values_are_codes_less_zero_point_times_scale(spec, dtype):
    q = quantize(_x((2, 64, 16)).clip(-100, 100).astype(dtype), spec)
    scale = np.asarray(q.scale).astype(np.float32)
    if q.global_scale is not None:
        scale = scale * np.asarray(q.global_scale)
    levels = np.asarray(q.spec.format.decode(q.codes()))
    parts = [n // s for n, s in zip(q.shape, scale.shape, strict=True)]

    def expand(a):
        for axis, part in enumerate(parts):
            a = np.repeat(a, part, axis)
        return a

    if q.zero_point is not None:
        levels = levels - expand(np.asarray(q.zero_point).astype(np.float32))
    expected = (levels * expand(scale)).astype(dtype)
    assert q.dequantize().dtype == q.dtype == dtype
    testing.assert_same_bits(q.dequantize(), expected)
    assert q.dequantize(jnp.float32).dtype == jnp.float32


@pytest.mark.parametrize(
    ("spec", "nbytes"),
    [
        # 64 x 32: words of 64 * bits / 8 bytes a column; then scales, zero points, global scale.
        (INT4, 32 * 32 + 4 * 4 * 32),
        (UINT3, 24 * 32 + 2 * 32 + 32),
        (NVFP4, 32 * 32 + 4 * 32 + 4),
        (QuantSpec(format=formats.TERNARY, granularity=PerTensor()), 16 * 32 + 4),
        (QuantSpec(format=formats.BINARY, scale_format=BFLOAT16), 8 * 32 + 2 * 32),
        (TOKENS, 64 * 32 + 64 * 2 * 4),
    ],
    ids=lambda v: v.format.name if isinstance(v, QuantSpec) else "",
)
def test_bytes_are_those_of_words_scales_and_zero_points(spec, nbytes):
    q = quantize(_x(), spec)
    assert (q.shape, q.ndim, q.size) == ((64, 32), 2, 2048)
    assert q.nbytes == nbytes
    assert q.bits_per_weight == nbytes * 8 / 2048


def test_padding_counts_and_is_the_code_of_zero():
    q = quantize(_x((33, 4)), QuantSpec(format=formats.INT4))
    assert q.shape == (33, 4)
    assert q.words[0].shape == (8, 4)
    padded = np.asarray(packing.unpack(q.words[0], 4))[33:]
    assert (padded == formats.INT4.zero_code).all()


@pytest.mark.parametrize("spec", [INT4, UINT3, NVFP4, TOKENS], ids=lambda s: s.format.name)
def test_it_is_a_pytree_that_maps_scans_and_stacks(spec):
    x = _x((2, 64, 16))
    q = quantize(x, spec)
    dense = np.asarray(q.dequantize())
    dequantize = QTensor.dequantize
    testing.assert_same_bits(jax.jit(dequantize)(q), dense, "jit")
    testing.assert_same_bits(jax.vmap(dequantize)(q), dense, "vmap")
    scan = jax.lax.scan(lambda _, part: (None, part.dequantize()), None, q)[1]
    testing.assert_same_bits(scan, dense, "scan")
    second = jax.tree.map(lambda leaf: leaf[1], q)
    assert second.shape == (64, 16)
    testing.assert_same_bits(second.dequantize(), dense[1], "a slice")
    parts = [jax.tree.map(lambda leaf, i=i: leaf[i], q) for i in range(2)]
    testing.assert_same_bits(jax.tree.map(lambda *leaves: jnp.stack(leaves), *parts), q, "stacked")
    by_slices = jax.vmap(lambda x: quantize(x, spec))(x)
    testing.assert_same_bits(by_slices, q, "quantized by slices")


def test_all_of_it_is_itself_and_other_indices_are_refused():
    q = quantize(_x(), INT4)
    assert q[...] is q
    with pytest.raises(NotImplementedError, match=r"only q\[\.\.\.\]"):
        q[0]
    assert "int4" in repr(q)
    assert "(64, 32)" in repr(q)


def test_the_tree_says_how_it_is_quantized_without_arrays():
    q = jax.eval_shape(lambda: quantize(_x(), INT4))
    assert q.shape == (64, 32)
    assert q.nbytes == quantize(_x(), INT4).nbytes
    assert json.dumps(q.spec.to_dict())


@pytest.mark.parametrize("spec", [INT4, UINT3, NVFP4, TOKENS], ids=lambda s: s.format.name)
def test_quantizing_its_values_with_its_range_gives_its_codes(spec):
    q = quantize(_x(), spec)
    range_ = q.range()
    zero_point = None if q.zero_point is None else range_.zero_point
    again = quantize(
        q.dequantize(),
        spec,
        scale=range_.scale,
        zero_point=zero_point,
        global_scale=range_.global_scale,
    )
    testing.assert_same_bits(again, q)


def test_a_negative_scale_keeps_its_sign():
    # GGUF's Q4_0 has them: the largest magnitude is code 0, whatever its sign.
    x = jnp.float32([[8.0], [-7.0], [1.0]])
    q = quantize(x, QuantSpec(format=formats.INT4), scale=jnp.float32([[-1.0]]))
    assert np.asarray(q.codes())[:, 0].tolist() == [0, 15, 7]
    np.testing.assert_array_equal(q.dequantize(), x)


def test_scales_are_rounded_to_the_stored_format_before_they_are_used():
    spec = QuantSpec(format=formats.INT4, scale_format=BFLOAT16)
    q = quantize(jnp.float32([[3.0]]), spec, scale=jnp.float32([[1.001]]))
    assert float(q.scale[0, 0]) == 1.0
    assert float(q.dequantize()[0, 0]) == 3.0


def _scale(shape=(4, 32)):
    return jnp.ones(shape, jnp.float32)


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"spec": INT4, "scale": _scale((1, 32))}, r"scale has shape \(1, 32\).* \(4, 32\)"),
        ({"spec": INT4, "scale": _scale(), "zero_point": _scale()}, "has no zero_point"),
        ({"spec": UINT3, "scale": _scale((1, 32))}, "needs a zero_point"),
        (
            {"spec": UINT3, "scale": _scale((1, 32)), "zero_point": _scale((1, 1))},
            r"zero_point has shape \(1, 1\)",
        ),
        ({"spec": NVFP4, "scale": _scale()}, "need a global_scale"),
        ({"spec": INT4, "scale": _scale(), "global_scale": _scale((1, 1))}, "have no global"),
        (
            {"spec": NVFP4, "scale": _scale(), "global_scale": _scale((4, 1))},
            r"global_scale has shape \(4, 1\).* \(1, 1\)",
        ),
        ({"spec": INT4, "zero_point": _scale()}, "go with a scale"),
        ({"spec": INT4, "scale": _scale() * np.float32(np.inf)}, "the scale holds 128 of 128"),
    ],
    ids=lambda v: "" if isinstance(v, dict) else v[:20],
)
def test_ranges_that_do_not_fit_are_refused(kwargs, message):
    with pytest.raises(ValueError, match=message):
        quantize(_x(), **kwargs)


def test_arrays_that_are_not_finite_or_not_float_are_refused():
    x = _x().at[3, 4].set(np.nan).at[5, 6].set(np.inf)
    with pytest.raises(ValueError, match="2 of 2048 values that are NaN or infinite"):
        quantize(x, INT4)
    with pytest.raises(ValueError, match="float array, not int32"):
        quantize(jnp.ones((64, 32), jnp.int32), INT4)
    with pytest.raises(ValueError, match="does not split into groups of 16"):
        quantize(_x((40, 4)), INT4)


def test_planes_of_a_frozen_array_are_cut_along_n_like_the_array():
    x = _x()
    spec = QuantSpec(format=formats.INT5, granularity=PerChannel())
    whole, part = quantize(x, spec), quantize(x[:, 8:16], spec)
    for plane, cut in zip(whole.words, part.words, strict=True):
        np.testing.assert_array_equal(plane[:, 8:16], cut)


@pytest.mark.parametrize("wrong", [-1, 16, 2.5, float("nan")])
def test_zero_points_outside_the_codes_are_refused(wrong):
    spec = QuantSpec(format=formats.UINT4, symmetric=False)
    x = jnp.ones((8, 2), jnp.float32)
    scale = jnp.ones((1, 2), jnp.float32)
    zero_point = np.array([[3, wrong]], np.float32)
    with pytest.raises(ValueError, match=r"1 of 2 zero points .* \[0, 16\)"):
        quantize(x, spec, scale=scale, zero_point=zero_point)
