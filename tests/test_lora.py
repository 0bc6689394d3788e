"""QLoRA: the base is frozen and packed, adapters train, and merging gives the same function."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import lowbit_jax as lb
from lowbit_jax.lora import LoRALinear, add_lora, merge_lora
from lowbit_jax.testing import assert_same_bits

RECIPE = lb.Recipe.from_string("up|split|head=nf4_g64_dq;embed=w8a16")


class Net(nnx.Module):
    """A packed layer of every kind that has an adapter, and one that has none."""

    def __init__(self, rngs):
        self.embed = nnx.Embed(8, 64, rngs=rngs)
        self.up = nnx.Linear(64, 64, rngs=rngs)
        self.split = nnx.LinearGeneral(64, (2, 32), use_bias=False, rngs=rngs)
        self.head = nnx.LinearGeneral((2, 32), 8, axis=(-2, -1), rngs=rngs)

    def __call__(self, tokens):
        return self.head(jax.nn.silu(self.split(self.up(self.embed(tokens)))))


@pytest.fixture(scope="module")
def packed():
    return lb.pack_model(lb.quantize_model(Net(nnx.Rngs(0)), RECIPE))


@pytest.fixture(scope="module")
def tokens():
    return jnp.arange(6, dtype=jnp.int32).reshape(2, 3)


def _trained(model):
    """The adapters of a few steps' size, since a real B is not zero."""
    for path, leaf in nnx.to_flat_state(nnx.state(model, nnx.LoRAParam)):
        rng = np.random.default_rng(len(path[0]))
        leaf[...] = jnp.asarray(rng.normal(size=leaf.shape) * 0.05, jnp.float32)
    return model


def test_an_adapted_model_begins_as_the_packed_one(packed, tokens):
    model = add_lora(packed, rank=4, alpha=8, rngs=nnx.Rngs(1))
    assert_same_bits(model(tokens), packed(tokens))
    assert isinstance(model.up, LoRALinear)
    assert model.up.lora_a.shape == (64, 4)
    assert isinstance(model.embed, lb.nn.PackedEmbed)
    assert not isinstance(packed.up, LoRALinear)


def test_the_layer_is_the_equation_of_the_paper(packed):
    model = _trained(add_lora(packed, rank=4, alpha=16, rngs=nnx.Rngs(1)))
    x = np.random.default_rng(0).normal(size=(2, 3, 64)).astype(np.float32)
    layer = model.up
    w, a, b, bias = (
        np.asarray(v, np.float64)
        for v in (
            layer.linear.quantized_kernel(), layer.lora_a[...], layer.lora_b[...],
            layer.linear.bias[...],
        )
    )  # fmt: skip
    want = x @ w + bias + (16 / 4) * (x @ a @ b)
    # Sums of 64 float32 products of the order of one, in two stages.
    np.testing.assert_allclose(layer(jnp.asarray(x)), want, atol=64 * 2.0**-22)


def test_gradients_reach_the_adapters_alone_and_are_those_of_the_equation(packed, tokens):
    model = _trained(add_lora(packed, rank=2, alpha=2, rngs=nnx.Rngs(1)))
    graphdef, adapters, rest = nnx.split(model, nnx.LoRAParam, ...)

    @jax.jit
    def gradient(adapters):
        return jax.grad(lambda a: jnp.sum(nnx.merge(graphdef, a, rest)(tokens) ** 2))(adapters)

    got = dict(nnx.to_flat_state(gradient(adapters)))
    assert set(got) == {(n, f"lora_{f}") for n in ("up", "split", "head") for f in "ab"}
    floats = merge_lora(model)

    def merged_loss(deltas):
        copy = nnx.clone(floats)
        for name, delta in deltas.items():
            kernel = getattr(copy, name).kernel
            kernel[...] = kernel[...] + delta.reshape(kernel.shape)
        return jnp.sum(copy(tokens) ** 2)

    names = ("up", "split", "head")
    k_n = {name: getattr(model, name).linear.matrix.shape for name in names}
    d = jax.grad(merged_loss)({name: jnp.zeros(shape) for name, shape in k_n.items()})
    for name in names:
        a, b = (np.asarray(adapters[name][f"lora_{f}"][...]) for f in "ab")
        dw = np.asarray(d[name])
        # W = W0 + A B gives dA = dW B^T and dB = A^T dW; float32 sums in another order.
        tolerance = {"rtol": 1e-3, "atol": 1e-4 * np.abs(dw).max()}
        np.testing.assert_allclose(got[name, "lora_a"][...], dw @ b.T, **tolerance)
        np.testing.assert_allclose(got[name, "lora_b"][...], a.T @ dw, **tolerance)


def test_merging_keeps_the_function_and_leaves_float_layers(packed, tokens):
    model = _trained(add_lora(packed, rank=4, alpha=8, rngs=nnx.Rngs(1), pattern="up|head"))
    merged = merge_lora(model)
    assert [type(merged.up), type(merged.head)] == [nnx.Linear, nnx.LinearGeneral]
    assert isinstance(merged.split, lb.nn.PackedLinearGeneral)
    got, want = np.asarray(merged(tokens)), np.asarray(model(tokens))
    # Float32 sums over 64 in another order, through three layers.
    np.testing.assert_allclose(got, want, atol=1e-5 * max(1.0, np.abs(want).max()))
    lb.quantize_model(dequantized := lb.dequantize_model(merged), "w4a16")
    assert type(dequantized.split) is nnx.LinearGeneral


def test_double_quantization_takes_an_eighth_of_a_bit(packed):
    single = lb.quantize(packed.up.quantized_kernel(), lb.presets["nf4_g64"].weight.spec)
    matrix = packed.up.matrix
    # 4 bits, 8 / 64 for the block's scale, and twice 32 bits for this one row of blocks: QLoRA has
    # 32 per 256 blocks (arXiv:2305.14314, section 3: 0.127 instead of 0.5 bits of scales).
    assert matrix.bits_per_weight == 4 + 8 / 64 + 64 / matrix.size
    assert single.bits_per_weight == 4 + 32 / 64
    kernel = np.asarray(Net(nnx.Rngs(0)).up.kernel[...])
    error = [np.sqrt(np.mean((np.asarray(q.dequantize()) - kernel) ** 2)) for q in (
        lb.quantize(jnp.asarray(kernel), lb.presets["nf4_g64"].weight.spec),
        packed.up.matrix,
    )]  # fmt: skip
    # Three bits of mantissa move a scale by at most 1 / 16, most by less than half of that: the
    # rounding of the weights, about 1 / 12 of the scale, stays what counts.
    assert error[1] < 1.1 * error[0]


@pytest.mark.parametrize(
    ("arguments", "error", "says"),
    [
        ({"rank": 0}, ValueError, "rank=0 must be at least 1"),
        ({"pattern": "nothing"}, ValueError, r"'nothing' matches no packed .* \['embed', 'head'"),
        ({"pattern": "embed"}, NotImplementedError, "embed: a PackedEmbed"),
    ],
)
def test_what_takes_no_adapter_is_said(packed, arguments, error, says):
    with pytest.raises(error, match=says):
        add_lora(packed, **{"rank": 2, "alpha": 2, "rngs": nnx.Rngs(0)} | arguments)


def test_adapters_come_once_and_only_to_packed_layers(packed):
    model = add_lora(packed, rank=2, alpha=2, rngs=nnx.Rngs(0))
    with pytest.raises(ValueError, match="has an adapter already"):
        add_lora(model, rank=2, alpha=2, rngs=nnx.Rngs(0))
    with pytest.raises(ValueError, match=r"call lb\.pack_model first"):
        add_lora(Net(nnx.Rngs(0)), rank=2, alpha=2, rngs=nnx.Rngs(0))
    with pytest.raises(ValueError, match="no layer of this model has an adapter"):
        merge_lora(packed)
