"""Scales that are quantized in their turn: QLoRA's, SpQR's and QServe's, against their papers."""

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import lowbit_jax as lb
from lowbit_jax import formats, ptq, quantizers, testing
from lowbit_jax.qtensor import with_one_level
from lowbit_jax.spec import Block, PerGroup, QuantSpec, SecondLevel

K, N = 64, 32
QLORA = SecondLevel(spec=QuantSpec(format=formats.DYNAMIC8), offset="mean")
SPQR = SecondLevel(
    spec=QuantSpec(format=formats.INT3_HALF, granularity=PerGroup(16)), offset="middle"
)
PLAIN = SecondLevel(spec=QuantSpec(format=formats.INT8, granularity=Block(1, None)))
NF4 = QuantSpec(format=formats.NF4, granularity=PerGroup(16), second=QLORA)
INT3 = QuantSpec(format=formats.UINT3, granularity=PerGroup(16), symmetric=False, second=SPQR)
UINT4 = QuantSpec(format=formats.UINT4, granularity=PerGroup(16), symmetric=False, second=PLAIN)
TERNARY = QuantSpec(format=formats.TERNARY, granularity=PerGroup(16), second=QLORA)
CASES = (
    quantizers.Absmax(NF4),
    quantizers.Absmax(dataclasses.replace(NF4, second=PLAIN), share=0.9),
    quantizers.MinMax(INT3),
    quantizers.AbsMean(TERNARY),
    quantizers.Progressive(UINT4),
    quantizers.FixedRange(NF4),
    quantizers.FixedRange(INT3),
)


@pytest.fixture(scope="module")
def kernel():
    return np.random.default_rng(0).normal(size=(K, N)).astype(np.float32)


@pytest.mark.parametrize(
    "transform", [testing.eager, testing.jitted, testing.vmapped, testing.scanned]
)
def test_the_law_holds(transform):
    stack = testing.awkward_array((3, K, N), seed=0)
    law = testing.Law(CASES, transform)
    _, frozen = law.check(stack)
    for q, stored in zip(CASES, frozen, strict=True):
        scale = stored.scale
        assert isinstance(scale, lb.QTensor), q
        assert scale.words[0].dtype == np.int32
        assert (stored.scale_offset is None) == (q.spec.second.offset is None)


def test_the_law_holds_for_stacks_and_bfloat16():
    x = jnp.asarray(testing.awkward_array((2, K, N), seed=1), jnp.bfloat16)
    for q in CASES:
        state = q.init(x)
        testing.assert_same_bits(q.freeze(x, state).dequantize(), q.fake_quant(x, state), str(q))
        each = jnp.stack([q.fake_quant(row, q.init(row)) for row in x])
        testing.assert_same_bits(q.fake_quant(x, state), each, f"{q} of a stack")


def test_dynamic8_is_bitsandbytes_table():
    # Sums by hand of arXiv:2110.02861: 7 decades of 1, 2, .. 64 middles, both signs.
    values = np.array(formats.DYNAMIC8.values)
    assert len(values) == 256
    assert 0.0 in values
    assert values[-1] == 1.0
    np.testing.assert_allclose(values[-2], 1 - 0.9 / 128, rtol=1e-6)
    np.testing.assert_allclose(values[0], -(1 - 0.9 / 128), rtol=1e-6)
    np.testing.assert_allclose(values[values > 0][:3], [5.5e-7, 3.25e-6, 7.75e-6], rtol=1e-6)
    codes = jnp.arange(256, dtype=jnp.uint8)
    np.testing.assert_array_equal(formats.DYNAMIC8.encode(formats.DYNAMIC8.decode(codes)), codes)
    testing.check_format(formats.DYNAMIC8, np.random.default_rng(0).normal(size=4096))
    assert formats.get("dynamic8") is formats.DYNAMIC8
    assert int(formats.DYNAMIC8.encode(jnp.float32(np.nan))) == 0  # as in a codebook of few values


def test_qlora_rounds_scales_less_their_mean_to_8_bits(kernel):
    q = lb.quantize(jnp.asarray(kernel), NF4)
    absmax = np.abs(kernel.reshape(K // 16, 16, N)).max(1).astype(np.float64)
    centred = absmax - absmax.mean()
    unit = np.abs(centred).max(1, keepdims=True)
    values = np.array(formats.DYNAMIC8.values)
    nearest = values[np.abs(centred[..., None] / unit[..., None] - values).argmin(-1)]
    np.testing.assert_allclose(q.range().scale, nearest * unit + absmax.mean(), rtol=1e-6)
    # 8 bits of scales in place of 32, a factor for each row of groups and one mean.
    assert q.nbytes == K * N // 2 + K // 16 * N + 4 * (K // 16) + 4


def test_spqr_rounds_scales_between_their_extremes_to_3_bits(kernel):
    q = lb.quantize(jnp.asarray(kernel), INT3)
    groups = kernel.reshape(K // 16, 16, N).astype(np.float64)
    low, high = np.minimum(groups.min(1), 0), np.maximum(groups.max(1), 0)
    scale = ((high - low) / 7).reshape(K // 16, N // 16, 16)
    least, most = scale.min(-1, keepdims=True), scale.max(-1, keepdims=True)
    step = (most - least) / 7
    expected = (np.round((scale - least) / step) * step + least).reshape(K // 16, N)
    np.testing.assert_allclose(q.range().scale, expected, rtol=1e-5)
    np.testing.assert_array_equal(q.zero_point, np.clip(np.round(-low / expected), 0, 7))


def test_qserve_groups_are_integers_inside_int8(kernel):
    q = quantizers.Progressive(UINT4).freeze(jnp.asarray(kernel), {})
    first = np.abs(kernel).max(0) / np.float32(119)
    integers = np.round(kernel / first).reshape(K // 16, 16, N)
    low, high = np.minimum(integers.min(1), 0), np.maximum(integers.max(1), 0)
    steps = np.maximum(np.round((high - low) / 15), 1)
    stored = np.asarray(q.scale.codes()).T.astype(int) + int(formats.INT8.qmin)
    np.testing.assert_array_equal(stored, steps)
    np.testing.assert_array_equal(q.zero_point, np.clip(np.round(-low / steps), 0, 15))
    codes = np.asarray(q.codes()).reshape(K // 16, 16, N).astype(int)
    inside = (codes - np.asarray(q.zero_point)[:, None].astype(int)) * stored[:, None]
    assert np.abs(inside).max() <= 127
    np.testing.assert_allclose(q.dequantize(), inside.reshape(K, N) * first, rtol=1e-6)


def test_a_code_and_its_value_do_not_change_without_the_second_level(kernel):
    for q in CASES:
        frozen = q.freeze(jnp.asarray(kernel), q.init(jnp.asarray(kernel)))
        plain = with_one_level(frozen)
        assert plain.spec.second is None
        testing.assert_same_bits(plain.dequantize(), frozen.dequantize())
        testing.assert_same_bits(plain.words, frozen.words)
        assert with_one_level(plain) is plain


def test_the_spec_survives_json_and_old_files_say_nothing_of_it():
    for spec in (NF4, INT3, UINT4):
        data = json.loads(json.dumps(spec.to_dict()))
        assert QuantSpec.from_dict(data) == spec
    assert "second" not in QuantSpec(format=formats.INT4).to_dict()
    with pytest.raises(ValueError, match=r"second has the keys \['spec'\]"):
        QuantSpec.from_dict(data | {"second": {"spec": data["second"]["spec"]}})


class Net(nnx.Module):
    """Two layers, or for the driver one block."""

    def __init__(self, rngs):
        self.up = nnx.Linear(K, 128, rngs=rngs)
        self.down = nnx.Linear(128, N, rngs=rngs)

    def __call__(self, x):
        return self.down(jax.nn.relu(self.up(x)))


@pytest.mark.parametrize("spec", [NF4, INT3, UINT4], ids=["qlora", "spqr", "qserve"])
def test_a_model_trains_packs_multiplies_and_is_kept(spec, tmp_path):
    quantizer = {NF4: quantizers.Absmax, INT3: quantizers.MinMax}.get(spec, quantizers.Progressive)
    scheme = lb.LayerScheme(weight=quantizer(spec))
    model = lb.quantize_model(Net(nnx.Rngs(0)), lb.Recipe(lb.Rule(".*", scheme)))
    x = jnp.asarray(np.random.default_rng(1).normal(size=(5, K)), jnp.float32)
    gradient = nnx.grad(lambda m: jnp.sum(m(x) ** 2))(model)
    assert all(float(jnp.abs(leaf).max()) > 0 for leaf in jax.tree.leaves(gradient))
    packed = lb.pack_model(model)
    tolerance = testing.dot_tolerance(jnp.abs(model(x)) + 1, packed.down.quantized_kernel())
    np.testing.assert_allclose(packed(x), model(x), atol=64 * tolerance)
    prepared = lb.prepare_model(packed)
    np.testing.assert_allclose(prepared(x), packed(x), atol=64 * tolerance)
    lb.checkpoint.save(tmp_path / "packed", packed)
    loaded = lb.checkpoint.load(tmp_path / "packed", model=Net(nnx.Rngs(1)), verify=True)
    testing.assert_same_bits(nnx.state(loaded), nnx.state(packed))


class Chain(nnx.Module):
    """One block."""

    def __init__(self, rngs):
        self.blocks = nnx.List([Net(rngs)])

    def __call__(self, x):
        for block in self.blocks:
            x = block(x)
        return x


def test_gptq_keeps_the_second_level():
    model = Chain(nnx.Rngs(0))
    mix = np.random.default_rng(1).normal(size=(K, K))
    x = jnp.asarray(np.random.default_rng(2).normal(size=(256, K)) @ mix, jnp.float32)
    recipe = lb.Recipe(lb.Rule("blocks/0/up", lb.LayerScheme(weight=quantizers.MinMax(INT3))))
    errors = []
    for solver in (ptq.GPTQ(), ptq.RoundToNearest()):
        found, _ = ptq.run(model, recipe, [x], pipeline=[solver], blocks=r"blocks/\d+")
        frozen = lb.pack_model(found).blocks[0].up.freeze_kernel()
        assert isinstance(frozen.scale, lb.QTensor)
        testing.assert_same_bits(frozen.dequantize(), found.blocks[0].up.quantized_kernel())
        difference = frozen.dequantize() - model.blocks[0].up.kernel[...]
        errors.append(float(jnp.sum((x @ difference) ** 2)))
    assert errors[0] < 0.8 * errors[1]
    for solver, message in (
        (ptq.AdaRound(steps=1), "moves every scale"),
        (ptq.HQQ(), "moves scales"),
    ):
        with pytest.raises(NotImplementedError, match=message):
            ptq.run(model, recipe, [x], pipeline=[solver], blocks=r"blocks/\d+")


def test_what_cannot_have_a_second_level_says_so():
    with pytest.raises(ValueError, match="int8 per channel"):
        SecondLevel(spec=QuantSpec(format=formats.INT8, second=PLAIN))
    with pytest.raises(ValueError, match="symmetrically"):
        SecondLevel(spec=QuantSpec(format=formats.UINT4, symmetric=False))
    with pytest.raises(ValueError, match="offset='median'"):
        SecondLevel(spec=PLAIN.spec, offset="median")
    with pytest.raises(ValueError, match="float16 scales"):
        dataclasses.replace(NF4, scale_format=lb.FLOAT16)
    with pytest.raises(ValueError, match="float32 scales of blocks"):
        dataclasses.replace(NF4, granularity=lb.PerToken())
    with pytest.raises(NotImplementedError, match="LSQ: takes scales that are stored"):
        quantizers.LSQ(dataclasses.replace(NF4, format=formats.INT4))
    with pytest.raises(ValueError, match=r"scales of shape \(4, 24\), transposed.*length 24"):
        lb.quantize(jnp.zeros((K, 24)), INT3)
    with pytest.raises(ValueError, match="Progressive: takes groups of one output"):
        quantizers.Progressive(INT3)
    with pytest.raises(ValueError, match="not negative"):
        lb.quantize(jnp.zeros((K, N)), NF4, scale=-jnp.ones((K // 16, N)))


def test_given_scales_are_stored_as_codes(kernel):
    scale = np.abs(kernel.reshape(K // 16, 16, N)).max(1)
    expected = lb.quantize(jnp.asarray(kernel), NF4)
    for f in (lb.quantize, jax.jit(lb.quantize, static_argnums=1)):
        testing.assert_same_bits(f(jnp.asarray(kernel), NF4, scale=jnp.asarray(scale)), expected)


def test_searched_ranges_are_stored_as_codes_and_are_no_worse(kernel):
    for spec in (NF4, INT3):
        found = lb.calibrate.mse(jnp.asarray(kernel), spec)
        assert found.second is not None
        q = lb.qtensor.encode(jnp.asarray(kernel), spec, found)
        full = lb.quantize(jnp.asarray(kernel), spec)
        errors = [float(jnp.sum((t.dequantize() - kernel) ** 2)) for t in (q, full)]
        assert errors[0] <= errors[1]


def test_a_group_of_zeros_and_a_tiny_one_beside_a_large_one():
    x = np.zeros((K, N), np.float32)
    x[16:32] = 1e-20
    x[32:48] = 1e6
    for q in CASES[:5]:
        values = np.asarray(q.fake_quant(jnp.asarray(x), {}))
        assert np.isfinite(values).all(), q
        assert (values[:16] == 0).all(), q
        np.testing.assert_allclose(values[32:48], 1e6, rtol=0.15, err_msg=str(q))
