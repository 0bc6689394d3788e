"""Every twin against its definition: the float layer, called with a kernel that numpy quantized."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import lowbit_jax as lb
from lowbit_jax import nn
from lowbit_jax.testing import assert_same_bits, dot_tolerance

A8 = lb.Absmax(lb.QuantSpec(format=lb.INT8_NARROW, granularity=lb.PerToken()))
STATIC8 = lb.StaticAbsmax(lb.QuantSpec(format=lb.INT8_NARROW, granularity=lb.PerTensor()))
INT4 = lb.Absmax(lb.QuantSpec(format=lb.INT4, granularity=lb.PerTensor()))
pack = jax.jit(lb.pack_model)
call = jax.jit(lambda layer, x: layer(x))
attend = jax.jit(lambda layer, x: layer.attend(x))
kernel_of = jax.jit(lambda layer: layer.quantized_kernel())


def only(scheme):
    return lb.Recipe(lb.Rule(".*", scheme))


def quantize(layer, scheme):
    return lb.quantize_model(layer, only(scheme))


def normal(shape, seed=0):
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


def init(key, shape, dtype):
    """An initializer that compiles nothing."""
    return jnp.asarray(normal(shape, seed=len(shape)) / 4, dtype)


Linear = functools.partial(nnx.Linear, kernel_init=init)
LinearGeneral = functools.partial(nnx.LinearGeneral, kernel_init=init)
Einsum = functools.partial(nnx.Einsum, kernel_init=init)
Conv = functools.partial(nnx.Conv, kernel_init=init)
Embed = functools.partial(nnx.Embed, embedding_init=init)


def int4_in_numpy(w, axes):
    """GPTQ's symmetric int4 with one scale over `axes`, in float32 and one operation at a time."""
    absmax = np.abs(w).max(axis=axes, keepdims=True)
    scale = absmax * np.float32(1 / 7.5)
    levels = np.clip(np.round(w * (np.float32(1) / scale)), -8, 7)
    return (levels + np.float32(0)) * scale  # no code stands for minus zero


def int8_rows_in_numpy(x, axes):
    """BitNet's activations: absmax / 127 over `axes`."""
    scale = np.abs(x).max(axis=axes, keepdims=True) * np.float32(1 / 127)
    levels = np.clip(np.round(x * (np.float32(1) / scale)), -127, 127)
    return (levels + np.float32(0)) * scale


def assert_same_sums(actual, expected, x, kernel):
    """Equal but for the order of float32 sums; in bfloat16, but for the rounding of both.

    A packed product keeps its weights in float32 where the float layer rounds them to bfloat16.
    """
    assert actual.dtype == expected.dtype
    matrix = np.abs(np.asarray(kernel, np.float64)).reshape(-1, kernel.shape[-1])
    atol = 2 * dot_tolerance(x, matrix)
    if expected.dtype == jnp.bfloat16:  # of weights, and twice of the result
        atol = 3 * 2.0**-8 * np.abs(x).max() * matrix.sum(axis=0).max()
    actual, expected = (np.asarray(y, np.float64) for y in (actual, expected))
    np.testing.assert_allclose(actual, expected, rtol=0, atol=atol)


# name: (layer, x's shape, the kernel's axes that one matrix covers, K axes of x, numpy equation)
# A convolution's groups lie in the last axis: its kernel is given as a pair of reshapes.
CASES = {
    "linear": (
        lambda r: Linear(32, 8, rngs=r),
        (2, 3, 32), (0, 1), (2,), "btk,kn->btn",
    ),
    "linear_bfloat16": (
        lambda r: Linear(32, 8, use_bias=False, dtype=jnp.bfloat16, rngs=r),
        (4, 32), (0, 1), (1,), None,
    ),
    "two_axes": (
        lambda r: LinearGeneral((2, 16), (3, 4), axis=(1, -1), rngs=r),
        (5, 2, 4, 16), (0, 1, 2, 3), (1, 3), "bktl,klhd->bthd",
    ),
    "axes_in_any_order": (
        lambda r: LinearGeneral((2, 16), 3, axis=(-1, 1), rngs=r),
        (5, 2, 4, 16), (0, 1, 2), (1, 3), "bktl,kln->btn",
    ),
    "batch_axis": (
        lambda r: LinearGeneral(16, 4, batch_axis={0: 3}, rngs=r),
        (3, 5, 16), (1, 2), (2,), "ebk,ekn->ebn",
    ),
    "einsum_heads": (
        lambda r: Einsum("btd,dhk->bthk", (16, 2, 4), (2, 4), rngs=r),
        (2, 3, 16), (0, 1, 2), (2,), "btd,dhk->bthk",
    ),
    "einsum_experts": (
        lambda r: Einsum("ebd,efd->ebf", (3, 8, 16), rngs=r),
        (3, 4, 16), (1, 2), (2,), "ebd,efd->ebf",
    ),
    "einsum_ellipsis": (
        lambda r: Einsum("...hk,hkd->...d", (2, 8, 6), rngs=r),
        (2, 3, 2, 8), (0, 1, 2), (2, 3), "bthk,hkd->btd",
    ),
    "einsum_ellipsis_behind": (
        lambda r: Einsum("dh...,dhn->n...", (4, 4, 6), rngs=r),
        (4, 4, 2, 3), (0, 1, 2), (0, 1), "dhbt,dhn->nbt",
    ),
}  # fmt: skip
INT8_CASES = [
    "linear", "axes_in_any_order", "batch_axis", "einsum_experts", "einsum_ellipsis_behind"
]  # fmt: skip


def with_kernel(layer, kernel):
    """The float layer with another kernel."""
    copy = nnx.clone(layer)
    (copy.embedding if isinstance(layer, nnx.Embed) else copy.kernel)[...] = jnp.asarray(kernel)
    return copy


@pytest.mark.parametrize("name", CASES)
def test_a_twin_is_the_float_layer_with_the_kernel_quantized_in_its_view(name):
    make, shape, axes, _, equation = CASES[name]
    layer, x = make(nnx.Rngs(0)), normal(shape)
    kernel = np.asarray(layer.kernel[...])
    expected = int4_in_numpy(kernel, axes)
    twin = quantize(layer, lb.LayerScheme(weight=INT4))
    assert type(twin) is nn.TRAIN_TWINS[type(layer)]
    y = call(twin, x)
    packed = pack(twin)
    assert_same_bits(kernel_of(twin), expected, name)
    assert_same_bits(kernel_of(packed), expected, f"packed {name}")
    if name != "einsum_experts":  # whose kernel XLA transposes, or does not, and sums accordingly
        assert_same_bits(y, call(with_kernel(layer, expected), x), name)
        assert_same_sums(call(packed, x), y, x, expected)
    if equation is not None:
        exact = np.einsum(equation, x, expected, dtype=np.float64)
        # The bias is zero, so only the order of K <= 32 products differs.
        atol = 32 * np.finfo(np.float32).eps * np.abs(x).max() * 32 * np.abs(expected).max()
        np.testing.assert_allclose(y, exact, rtol=0, atol=atol)


@pytest.mark.parametrize("name", ["linear", "axes_in_any_order", "einsum_ellipsis_behind"])
def test_inputs_are_quantized_over_the_contraction(name):
    make, shape, _, k_axes, _ = CASES[name]
    layer, x = make(nnx.Rngs(0)), normal(shape)
    twin = quantize(layer, lb.LayerScheme(input=A8))
    assert_same_bits(call(twin, x), call(layer, int8_rows_in_numpy(x, k_axes)), name)
    # A layer of which only activations are quantized keeps its float kernel when it is packed.
    assert_same_bits(call(pack(twin), x), call(twin, x), f"packed {name}")


def test_groups_of_the_input_are_groups_of_the_kernels_k():
    # K is (2, 16): groups of 16 are the rows of axis 1, whatever order the layer names its axes in.
    make, shape, *_ = CASES["axes_in_any_order"]
    layer, x = make(nnx.Rngs(0)), normal(shape)
    grouped = lb.Absmax(lb.QuantSpec(format=lb.INT8_NARROW, granularity=lb.PerToken(16)))
    twin = quantize(layer, lb.LayerScheme(input=grouped))
    assert_same_bits(call(twin, x), call(layer, int8_rows_in_numpy(x, (3,))))


def test_outputs_are_quantized_after_the_bias():
    layer = Linear(16, 8, bias_init=nnx.initializers.ones, rngs=nnx.Rngs(0))
    x = normal((3, 16))
    twin = quantize(layer, lb.LayerScheme(output=A8))
    expected = int8_rows_in_numpy(np.asarray(call(layer, x)), (1,))
    assert_same_bits(call(twin, x), expected)


CONVS = {
    "groups_causal": (
        {"kernel_size": (3,), "padding": "CAUSAL", "feature_group_count": 2},
        (2, 5, 4),
    ),
    "strided_circular": (
        {"kernel_size": (3, 3), "padding": "CIRCULAR", "strides": 2, "use_bias": False},
        (2, 6, 6, 4),
    ),
    "masked_unbatched": ({"kernel_size": (3,), "padding": "SAME", "mask": True}, (5, 4)),
}


@pytest.mark.parametrize("name", CONVS)
def test_a_convolution_is_the_float_layer_with_one_matrix_per_group(name):
    options, shape = CONVS[name]
    if options.pop("mask", False):
        options["mask"] = jnp.asarray(normal((3, 4, 6)) > 0, jnp.float32)
    layer, x = Conv(4, 6, rngs=nnx.Rngs(0), **options), normal(shape)
    kernel = np.asarray(layer.kernel[...])
    groups = np.split(kernel, options.get("feature_group_count", 1), axis=-1)
    expected = np.concatenate([int4_in_numpy(g, None) for g in groups], axis=-1)
    twin = quantize(layer, lb.LayerScheme(weight=INT4))
    y = call(twin, x)
    assert_same_bits(y, call(with_kernel(layer, expected), x), name)
    assert_same_bits(call(pack(twin), x), y, f"packed {name}")


def test_a_strided_circular_convolution_against_loops():
    layer = Conv(2, 3, (3, 3), strides=2, padding="CIRCULAR", rngs=nnx.Rngs(0))
    x = normal((4, 4, 2))
    w = int4_in_numpy(np.asarray(layer.kernel[...]), (0, 1, 2, 3)).astype(np.float64)
    expected = np.zeros((2, 2, 3))
    for i, j, a, b in np.ndindex(2, 2, 3, 3):
        expected[i, j] += x[(2 * i + a - 1) % 4, (2 * j + b - 1) % 4] @ w[a, b]
    y = call(quantize(layer, lb.LayerScheme(weight=INT4)), x)
    assert y.shape == expected.shape
    atol = dot_tolerance(np.abs(x).max() * np.ones((1, 18)), w.reshape(18, 3))
    np.testing.assert_allclose(y, expected, rtol=0, atol=atol)


def test_a_convolutions_input_has_one_scale_per_sample():
    layer, x = Conv(4, 6, (3,), rngs=nnx.Rngs(0)), normal((2, 5, 4))
    twin = quantize(layer, lb.LayerScheme(input=A8))
    assert_same_bits(call(twin, x), call(layer, int8_rows_in_numpy(x, (1, 2))))


@pytest.mark.parametrize(("preset", "dtype"), [("w1_58a16", None), ("w4a16_g32", jnp.bfloat16)])
def test_an_embedding_looks_up_and_attends_with_one_table(preset, dtype):
    layer = Embed(10, 64, dtype=dtype, rngs=nnx.Rngs(0))
    # numpy's rules: 10 is outside, and so is -11; -1 is the last entry.
    tokens, x = jnp.array([[0, 9, 10], [-1, -11, 3]]), normal((3, 64))
    twin = quantize(layer, lb.presets[preset])
    packed = pack(twin)
    table = jax.jit(lambda twin: twin.freeze_kernel())(twin).dequantize()
    assert table.shape == (64, 10)
    float_layer = with_kernel(layer, table.T)
    looked_up = call(twin, tokens)
    assert np.isnan(np.asarray(looked_up, np.float32)).any(axis=-1).tolist() == [
        [False, False, True],
        [False, True, False],
    ]
    assert_same_bits(looked_up, call(float_layer, tokens))
    assert_same_bits(call(packed, tokens), looked_up)
    logits = attend(twin, x)
    assert_same_bits(logits, attend(float_layer, x))
    assert_same_sums(attend(packed, x), logits, x, table)


def test_an_embeddings_input_quantizer_is_the_heads():
    layer, x = Embed(10, 16, rngs=nnx.Rngs(0)), normal((3, 16))
    twin = quantize(layer, lb.LayerScheme(input=A8))
    assert_same_bits(call(twin, jnp.arange(4)), call(layer, jnp.arange(4)))
    assert_same_bits(attend(twin, x), attend(layer, int8_rows_in_numpy(x, (1,))))


def test_attention_is_quantized_through_its_parts():
    layer = nnx.MultiHeadAttention(2, 16, decode=False, kernel_init=init, rngs=nnx.Rngs(0))
    x = normal((2, 3, 16))
    twin = lb.quantize_model(layer, only(lb.LayerScheme(weight=INT4)))
    paths = [path for path, _ in lb.quantized_layers(twin)]
    assert sorted(paths) == ["key", "out", "query", "value"]
    reference = nnx.clone(layer)
    for part in (reference.query, reference.key, reference.value, reference.out):
        part.kernel[...] = jnp.asarray(int4_in_numpy(np.asarray(part.kernel[...]), None))
    y = call(twin, x)
    assert_same_bits(y, call(reference, x))
    assert_same_bits(call(pack(twin), x), y)


def test_vmapped_layers_are_a_stack_with_a_scale_each():
    make = nnx.vmap(lambda r: Linear(32, 8, rngs=r))
    layers = make(nnx.Rngs(0).split(3))
    x = normal((3, 4, 32))
    twin = quantize(layers, lb.presets["w1_58a8"])
    mapped = jax.jit(nnx.vmap(lambda layer, x: layer(x)))
    y = mapped(twin, x)
    for i in range(3):
        one = Linear(32, 8, rngs=nnx.Rngs(0))
        one.kernel[...] = layers.kernel[...][i]
        assert_same_bits(call(quantize(one, lb.presets["w1_58a8"]), x[i]), y[i], f"layer {i}")
    packed = pack(twin)
    assert packed.kernel[...].shape == (3, 32, 8)
    assert packed.kernel[...].scale.shape == (3, 1, 1)
    assert_same_sums(mapped(packed, x), y, x, np.ones((32, 8)))  # a ternary kernel's scale is < 1


@pytest.mark.parametrize("name", INT8_CASES)
def test_the_int8_product_is_the_float_product_with_the_same_gradients(name):
    make, shape, *_ = CASES[name]
    layer, x = make(nnx.Rngs(0)), normal(shape)
    schemes = [
        lb.LayerScheme(weight=lb.Absmax(lb.QuantSpec(format=lb.INT8)), input=A8, product=product)
        for product in ("float", "int8")
    ]
    twins = [quantize(layer, scheme) for scheme in schemes]

    @jax.jit
    def output_and_gradients(twin, x):
        graphdef, kernel, rest = nnx.split(twin, nnx.Param, ...)
        y, vjp = jax.vjp(lambda p, x: nnx.merge(graphdef, p, rest)(x), kernel, x)
        return y, vjp(jnp.cos(jnp.arange(y.size, dtype=y.dtype)).reshape(y.shape))

    (y, gradients), (y8, gradients8) = (output_and_gradients(twin, x) for twin in twins)
    # The integers' sum is exact; the float sum of K <= 32 rounded products is not.
    kernel = np.abs(np.asarray(layer.kernel[...]))
    atol = 32 * np.finfo(np.float32).eps * np.abs(x).max() * kernel.max() * 32
    np.testing.assert_allclose(y8, y, rtol=0, atol=atol)
    assert not np.array_equal(y8, y) or name in ("batch_axis", "einsum_experts")
    assert_same_bits(gradients8, gradients, "the gradients")
    if name == "linear":
        assert_same_sums(call(pack(twins[1]), x), call(twins[1], x), x, layer.kernel[...])


def test_the_int8_product_keeps_the_dtype_that_the_layer_asks_for():
    # A head in bfloat16 with float32 logits, as in models.Decoder.
    scheme = lb.LayerScheme(
        weight=lb.Absmax(lb.QuantSpec(format=lb.INT8)), input=A8, product="int8"
    )
    for asked, expected in ((jnp.float32, jnp.float32), (None, jnp.bfloat16)):
        layer = Linear(16, 4, dtype=jnp.bfloat16, preferred_element_type=asked, rngs=nnx.Rngs(0))
        shape = nnx.eval_shape(lambda twin: twin(jnp.ones((2, 16))), quantize(layer, scheme))
        assert shape.dtype == expected


def test_the_int8_product_of_attentions_custom_dots_is_not_lost():
    scheme = lb.LayerScheme(
        weight=lb.Absmax(lb.QuantSpec(format=lb.INT8)), input=A8, product="int8"
    )
    layer = LinearGeneral(16, 4, dot_general_cls=lambda: jax.lax.dot_general, rngs=nnx.Rngs(0))
    jaxpr = jax.make_jaxpr(quantize(layer, scheme).__call__)(jnp.ones((2, 16)))
    assert "i8[2,16]" in str(jaxpr)


INT8_KERNEL = lb.Absmax(lb.QuantSpec(format=lb.INT8))
REFUSED = {
    "a grouped kernel": (
        Linear, lb.Absmax(lb.QuantSpec(format=lb.INT8, granularity=lb.PerGroup(16))), A8,
        r"kernels have scales in blocks \(int8 in groups of 16\)",
    ),
    "a kernel in blocks of columns": (
        Linear, lb.Absmax(lb.QuantSpec(format=lb.INT8, granularity=lb.Block(None, 4))), A8,
        "kernels have scales in blocks",
    ),
    "a kernel with zero points": (
        Linear, lb.presets["w4a16_asym"].weight, A8, "uint4 are not symmetric integers",
    ),
    "a half-shifted kernel": (
        Linear, lb.presets["w2a16"].weight, A8, "int2_half are not symmetric integers",
    ),
    "a float kernel": (Linear, lb.presets["mxfp4a16"].weight, A8, "fp4_e2m1"),
    "no input": (Linear, INT8_KERNEL, None, "needs a quantized kernel and quantized inputs"),
    "a convolution": (
        lambda i, o, rngs: Conv(i, o, (3,), rngs=rngs), INT8_KERNEL, A8, "50 times as long",
    ),
    "a sum over one operand": (
        lambda i, o, rngs: Einsum("abc,cd->ad", (i, o), rngs=rngs), INT8_KERNEL, A8,
        r"sums over \['b'\]",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", REFUSED)
def test_the_int8_product_refuses(name):
    make, weight, inputs, message = REFUSED[name]
    scheme = lb.LayerScheme(weight=weight, input=inputs, product="int8")
    with pytest.raises(NotImplementedError, match=message):
        quantize(make(32, 8, rngs=nnx.Rngs(0)), scheme)


def test_the_tied_head_refuses_the_int8_product():
    scheme = lb.LayerScheme(weight=INT8_KERNEL, input=A8, product="int8")
    twin = quantize(Embed(8, 16, rngs=nnx.Rngs(0)), scheme)
    with pytest.raises(NotImplementedError, match="no int8 product in the tied head"):
        nnx.eval_shape(lambda twin: twin.attend(jnp.ones((2, 16))), twin)


def test_learned_scales_get_gradients_and_others_are_no_parameters():
    layer, x = Linear(32, 8, rngs=nnx.Rngs(0)), normal((4, 32))
    twin = jax.jit(lambda layer: quantize(layer, lb.presets["w4a16_lsq"]))(layer)
    assert isinstance(twin.kernel_scale, nnx.Param)
    gradients = jax.jit(nnx.grad(lambda twin, x: (twin(x) ** 2).sum()))(twin, x)
    assert gradients["kernel_scale"].shape == (1, 8)
    assert np.all(np.asarray(gradients["kernel_scale"][...]) != 0)
    assert np.any(np.asarray(gradients["kernel"][...]) != 0)
    packed = pack(twin)
    assert sorted(nnx.state(packed)) == ["bias", "kernel"]
    assert_same_bits(packed.kernel[...].scale, twin.kernel_scale[...])
    assert set(nnx.state(quantize(layer, lb.presets["w1_58a8"]), nnx.Param)) == {"kernel", "bias"}


def test_an_einsum_keeps_its_equation():
    twin = quantize(Einsum("bd,df->bf", (16, 4), rngs=nnx.Rngs(0)), lb.presets["w4a16"])
    with pytest.raises(ValueError, match="cannot be used with 'bd,df->fb'"):
        twin(jnp.ones((2, 16)), "bd,df->fb")
    y = nnx.eval_shape(lambda twin: twin(jnp.ones((2, 16)), "bd,df->bf"), twin)
    assert y.shape == (2, 4)


def test_a_convolution_refuses_groups_of_its_input():
    grouped = lb.Absmax(lb.QuantSpec(format=lb.INT8_NARROW, granularity=lb.PerToken(4)))
    with pytest.raises(NotImplementedError, match="windows overlap"):
        quantize(Conv(4, 4, (3,), rngs=nnx.Rngs(0)), lb.LayerScheme(input=grouped))


def test_a_static_range_is_nan_until_calibrated_and_one_number_after():
    layer, x = Linear(16, 4, rngs=nnx.Rngs(0)), normal((3, 16))
    twin = quantize(layer, lb.LayerScheme(input=STATIC8))
    assert isinstance(twin.input_absmax, lb.QuantStat)
    assert np.isnan(np.asarray(call(twin, x))).all()
    lb.calibrate_model(twin, [x / 2, x, x / 4])
    np.testing.assert_array_equal(twin.input_absmax[...], np.abs(x).max(keepdims=True))
    expected = int8_rows_in_numpy(x, (0, 1))
    assert_same_bits(call(twin, x), call(layer, expected))
    lb.calibrate_model(twin, [x * 2])
    np.testing.assert_array_equal(twin.input_absmax[...], np.abs(2 * x).max(keepdims=True))


to_float = jax.jit(nn.to_float)


def test_to_float_gives_the_flax_layer_back():
    for name in ("two_axes", "einsum_heads"):
        make, shape, *_ = CASES[name]
        twin = quantize(make(nnx.Rngs(0)), lb.LayerScheme(weight=INT4))
        x = normal(shape)
        for source in (twin, pack(twin)):
            layer = to_float(source)
            assert type(layer) is twin.float_class
            assert_same_bits(call(layer, x), call(twin, x))
