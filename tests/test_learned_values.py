"""Arrays with learned values: packed, stored, multiplied, refused where values are constants."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

import lowbit_jax as lb
from lowbit_jax import formats
from lowbit_jax.interop.codecs.parts import Kernel
from lowbit_jax.interop.leaves import _check_codes
from lowbit_jax.models import MLP, MLPConfig
from lowbit_jax.ops.lookup import lookup
from lowbit_jax.qtensor import encode
from lowbit_jax.testing import assert_same_bits, dot_tolerance
from lowbit_jax.training.step import observed


def _ttq(shape=(64, 6), granularity=None):
    spec = lb.QuantSpec(format=formats.TERNARY_LEARNED, granularity=granularity or lb.PerChannel())
    quantizer = lb.quantizers.TTQ(spec)
    x = jax.random.normal(jax.random.key(0), shape, jnp.float32)
    return quantizer.freeze(x, quantizer.init(x))


def test_codes_stand_for_the_learned_numbers_and_padding_for_zero():
    q = _ttq((40, 3))
    w_n, w_p = np.asarray(q.basis)
    table = np.stack([-w_n, np.zeros_like(w_n), w_p])
    codes, values = np.asarray(q.codes()), np.asarray(q.dequantize())
    for j in range(3):
        np.testing.assert_array_equal(values[:, j], table[codes[:, j], j])
    # 40 rows fill 64 codes of 2 bits: 4 words a column; a scale and two numbers beside them.
    assert q.nbytes == 3 * (4 * 4 + 4 + 2 * 4)
    padded = np.asarray(lb.packing.unpack_planes(q.words, 2, 64))[40:]
    assert (padded == formats.TERNARY_LEARNED.zero_code).all()


def test_groups_along_k_have_a_basis_each():
    q = _ttq((64, 6), lb.Block(16, 3))
    assert q.scale.shape == (4, 2)
    assert q.basis.shape == (8, 2)
    values = np.asarray(q.dequantize())
    basis = np.asarray(q.basis).reshape(4, 2, 2)
    for block in range(4):
        for column in range(6):
            w_n, w_p = basis[block, :, column // 3]
            own = values[16 * block : 16 * block + 16, column]
            assert set(own.tolist()) <= {-float(w_n), 0.0, float(w_p)}


def test_it_is_a_pytree_that_stacks_scans_and_maps():
    parts = [_ttq((64, 6)), _ttq((64, 6))]
    stack = jax.tree.map(lambda *leaves: jnp.stack(leaves), *parts)
    assert stack.shape == (2, 64, 6)
    whole = stack.dequantize()
    _, scanned = jax.lax.scan(lambda c, q: (c, q.dequantize()), None, stack)
    mapped = jax.vmap(lambda q: q.dequantize())(stack)
    assert_same_bits([scanned, mapped], [whole, whole])


def test_products_take_the_form_of_xla_and_kernels_refuse():
    q = _ttq()
    x = jax.random.normal(jax.random.key(1), (5, 64), jnp.float32)
    expected = np.asarray(x, np.float64) @ np.asarray(q.dequantize(), np.float64)
    for matrix in (q, lb.prepare(q)):
        got = lb.matmul(x, matrix)
        np.testing.assert_allclose(got, expected, rtol=0, atol=dot_tolerance(x, q.dequantize()))
    for name in ("cpu", "interpret"):
        with pytest.raises(NotImplementedError, match="learned"):
            lb.matmul(x, q, implementation=name)
    with pytest.raises(NotImplementedError, match="learned"):
        lb.prepare(q, "cpu")
    tokens = jnp.asarray([3, 0, -1])
    np.testing.assert_array_equal(lookup(tokens, q), np.asarray(q.dequantize()).T[[3, 0, 5]])


def test_values_of_the_format_alone_are_refused():
    for fmt in formats.LEARNED:
        for call in (fmt.round, fmt.encode, fmt.decode):
            with pytest.raises(NotImplementedError, match="learned and lie in the QTensor"):
                call(jnp.zeros(3))
        assert formats.get(fmt.name) == fmt
        spec = lb.QuantSpec(format=fmt)
        assert lb.QuantSpec.from_dict(spec.to_dict()) == spec
        with pytest.raises(NotImplementedError, match="Absmax: takes not formats whose values"):
            lb.Absmax(spec)
        with pytest.raises(NotImplementedError, match="a quantizer that has them"):
            lb.quantize(jnp.ones((32, 2)), spec)
        with pytest.raises(ValueError, match="needs its basis"):
            encode(jnp.ones((32, 2)), spec, lb.calibrate.Range(jnp.ones((1, 2))))
    with pytest.raises(NotImplementedError, match="TTQ: takes only"):
        lb.quantizers.TTQ(lb.QuantSpec(format=lb.TERNARY))
    with pytest.raises(ValueError, match="factors"):
        formats.Learned("odd", 2, ((1, 2), (0, 1)))


def test_files_of_others_refuse_its_codes_and_take_its_values():
    q = _ttq()
    np.testing.assert_array_equal(Kernel(q).dequantize(), q.dequantize())
    with pytest.raises(NotImplementedError, match=r"^mlp/up: .*nearest that fits: .*w2a16_lsq"):
        _check_codes("mlp/up", q, None)


@pytest.mark.parametrize(
    "preset", ["w1_58a16_ttq", pytest.param("w2a16_lq", marks=pytest.mark.slow)]
)
def test_a_model_trains_packs_and_comes_back_from_its_checkpoint(preset, tmp_path):
    model = MLP(MLPConfig(32, (32,), 4), rngs=nnx.Rngs(0))
    model = lb.quantize_model(model, lb.Recipe(lb.Rule(".*", preset)))
    x = jax.random.normal(jax.random.key(1), (16, 32), jnp.float32)
    packed = lb.pack_model(model)
    for name, twin in lb.quantized_layers(model):
        frozen = dict(lb.quantized_layers(packed))[name].matrix
        assert_same_bits(twin.quantized_kernel(), frozen.dequantize())
    lb.checkpoint.save(tmp_path / "packed", packed)
    loaded = lb.checkpoint.load(tmp_path / "packed", verify=True)
    assert_same_bits(nnx.state(loaded, lb.Packed), nnx.state(packed, lb.Packed))
    np.testing.assert_allclose(loaded(x), packed(x), rtol=1e-6, atol=1e-6)
    row = lb.summary(packed).rows[0]
    assert row.kernel_bytes == dict(lb.quantized_layers(packed))[row.path].matrix.nbytes


def test_the_basis_of_lq_nets_follows_the_weights_behind_an_update():
    model = MLP(MLPConfig(32, (), 4), rngs=nnx.Rngs(0))
    model = lb.quantize_model(model, lb.Recipe(lb.Rule(".*", "w2a16_lq")))
    twin = model.head
    graphdef, params, rest = nnx.split(model, nnx.Param, ...)
    moved = optax.apply_updates(params, jax.tree.map(lambda p: 2 * p, params))
    model = nnx.merge(graphdef, moved, observed(graphdef, moved, rest))
    state = {"basis": twin.kernel_basis[...]}
    expected = twin.scheme.weight.observe(3 * twin.kernel[...], state)["basis"]
    np.testing.assert_allclose(model.head.kernel_basis[...], expected, rtol=1e-5)
    # Nothing to do for others, whose statistics are the very same arrays.
    other = lb.quantize_model(
        MLP(MLPConfig(32, (), 4), rngs=nnx.Rngs(0)), lb.Recipe(lb.Rule(".*", "w2a16"))
    )
    graphdef, params, rest = nnx.split(other, nnx.Param, ...)
    assert observed(graphdef, params, rest) is rest
