"""Parameters are cut where the table says, and cutting changes no result."""

import jax
import numpy as np
import pytest
from flax import nnx
from jax.sharding import AxisType, PartitionSpec

from lowbit_jax.models import Decoder, DecoderConfig, param_shardings, param_spec

P = PartitionSpec
CONFIG = DecoderConfig(
    vocab=30,
    dim=16,
    layers=2,
    heads=4,
    kv_heads=2,
    ffn_dim=24,
    max_length=8,
    qkv_bias=True,
    stacked=True,
)


@pytest.mark.parametrize(
    ("path", "shape", "spec"),
    [
        ("embed/embedding", (256, 64), P("tensor", "fsdp")),
        ("layers/0/attention/query/kernel", (64, 32), P("fsdp", "tensor")),
        ("layers/0/attention/value/bias", (32,), P("tensor")),
        ("layers/0/attention/out/kernel", (32, 64), P("tensor", "fsdp")),
        ("layers/mlp/down/kernel", (6, 128, 64), P(None, "tensor", "fsdp")),
        ("head/kernel", (64, 256), P("fsdp", "tensor")),
        ("layers/0/conv/kernel", (3, 3, 8, 16), P(None, None, "fsdp", "tensor")),
        ("0/mu/layers/0/mlp/up/kernel/value", (64, 128), P("fsdp", "tensor")),
        # What a twin adds has the kernel's rank: of length 1 where it is shared, else cut alike.
        ("layers/0/mlp/up/kernel_scale", (1, 128), P(None, "tensor")),
        ("layers/0/mlp/up/kernel_scale", (4, 128), P("fsdp", "tensor")),
        ("layers/0/mlp/up/kernel_scale", (1, 1), P(None, None)),
        ("layers/0/mlp/down/kernel_zero_point", (4, 64), P("tensor", "fsdp")),
        ("layers/mlp/down/kernel/words/0", (6, 8, 64), P(None, "tensor", "fsdp")),
        # Scales that are quantized are transposed, [outputs, groups of inputs].
        ("layers/0/mlp/up/kernel/scale/words_0", (32, 4), P("tensor", "fsdp")),
        ("layers/0/mlp/up/kernel/value/scale/words/0", (32, 4), P("tensor", "fsdp")),
        ("layers/0/mlp/down/kernel/scale/scale", (16, 4), P("fsdp", "tensor")),
        ("layers/0/mlp/up/kernel/scale_offset", (1, 1), P(None, None)),
        ("layers/0/mlp/up/kernel_second_scale", (32, 4), P("tensor", "fsdp")),
        ("layers/0/mlp/up/kernel/scale", (4, 128), P("fsdp", "tensor")),
        ("layers/0/mlp/up/input_scale", (1, 1), P(None, None)),
        ("layers/0/attention_norm/scale", (64,), P(None)),
        ("step", (), P()),
    ],
)
def test_each_array_is_cut_by_its_rule(path, shape, spec):
    assert param_spec(path, shape) == spec


def test_an_axis_that_the_mesh_lacks_or_does_not_divide_stays_whole():
    path = "layers/0/mlp/up/kernel"
    assert param_spec(path, (64, 128), {"data": 8}) == P(None, None)
    assert param_spec(path, (64, 128), {"fsdp": 4, "tensor": 2}) == P("fsdp", "tensor")
    assert param_spec(path, (62, 128), {"fsdp": 4, "tensor": 2}) == P(None, "tensor")


@pytest.mark.skipif(jax.device_count() < 8, reason="needs 8 devices, virtual ones will do")
def test_a_sharded_model_computes_what_a_whole_one_does(draw_model):
    mesh = jax.make_mesh((2, 2, 2), ("data", "fsdp", "tensor"), (AxisType.Auto,) * 3)
    whole = draw_model(lambda: Decoder(CONFIG, rngs=nnx.Rngs(0)))
    cut = jax.device_put(whole, param_shardings(whole, mesh))
    shard = cut.layers.mlp.up.kernel[...].addressable_shards[0].data
    assert shard.shape == (CONFIG.layers, CONFIG.dim // 2, CONFIG.ffn_dim // 2)

    forward = jax.jit(lambda model, tokens: model(tokens))
    tokens = np.arange(4 * 8, dtype=np.int32).reshape(4, 8) % CONFIG.vocab
    want = forward(whole, tokens)
    batch = jax.device_put(tokens, jax.NamedSharding(mesh, P(("data", "fsdp"))))
    got = forward(cut, batch)
    # Sums of at most ffn_dim terms in another order, 7 a layer and the head; first order.
    terms = (7 * CONFIG.layers + 1) * CONFIG.ffn_dim
    atol = terms * np.finfo(np.float32).eps * float(np.max(np.abs(want)))
    np.testing.assert_allclose(got, want, rtol=0, atol=atol)
