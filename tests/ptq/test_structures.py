"""Models whose structure a transform changed are rebuilt from their checkpoint."""

import jax
import pytest
from flax import nnx

import lowbit_jax as lb
from lowbit_jax import ptq
from lowbit_jax.models import Decoder, DecoderConfig, ResNet, ResNetConfig
from lowbit_jax.testing import assert_same_bits


@pytest.mark.parametrize(
    "ffn_dim",  # 22 has no Hadamard
    [pytest.param(24, marks=pytest.mark.slow, id="hadamard"), pytest.param(22, id="matrix")],
)
def test_a_rotated_decoder_is_loaded_packed(ffn_dim, tmp_path, batches):
    config = DecoderConfig(
        vocab=32, dim=16, layers=1, heads=4, kv_heads=2, ffn_dim=ffn_dim, max_length=16
    )
    model = Decoder(config, rngs=nnx.Rngs(0))
    found, _ = ptq.run(model, "w4a4", batches[:1], [ptq.Rotate(), ptq.RoundToNearest()])
    packed = lb.pack_model(found)
    lb.checkpoint.save(tmp_path / "packed", packed)
    loaded = lb.checkpoint.load(tmp_path / "packed")
    assert_same_bits(loaded(batches[0]), packed(batches[0]))


def test_a_folded_resnet_is_loaded_packed(tmp_path):
    model = ResNet(ResNetConfig(blocks=(1,), widths=(4,)), rngs=nnx.Rngs(0))
    model.eval()
    images = jax.random.normal(jax.random.key(0), (16, 6, 6, 3))
    stages = [ptq.FoldBatchNorm(), ptq.RoundToNearest()]
    found, _ = ptq.run(model, "w4a16", [images], stages, include=("conv",))
    packed = lb.pack_model(found)
    lb.checkpoint.save(tmp_path / "packed", packed)
    assert_same_bits(lb.checkpoint.load(tmp_path / "packed")(images), packed(images))
