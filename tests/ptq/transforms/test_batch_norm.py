"""Batch norms vanish into the layers in front of them, and unfolded ones are refused."""

import jax
import numpy as np
import pytest
from flax import nnx

from lowbit_jax.models import CNN, CNNConfig
from lowbit_jax.models.identity import Identity
from lowbit_jax.models.resnet import ResNet, ResNetConfig
from lowbit_jax.models.wiring import wiring_of
from lowbit_jax.ptq.chain import Chain, Rest
from lowbit_jax.ptq.transforms import CrossLayerEqualization, FoldBatchNorm, check_no_batch_norm
from lowbit_jax.walk import layers

CONFIG = CNNConfig(in_channels=2, channels=(4, 6), out_features=3)


@pytest.fixture
def model(bench):
    model = bench.draw(lambda: CNN(CONFIG, rngs=nnx.Rngs(0)))
    model.eval()
    return model


def test_a_folded_model_computes_the_same(bench, model, assert_same_function):
    x = jax.random.normal(jax.random.key(0), (2, 8, 8, 2))
    folded = FoldBatchNorm().prepare(bench.whole(model))
    assert_same_function(model(x), folded(x))
    modules = dict(layers(folded))
    assert isinstance(modules["layers/0/norm"], Identity)
    assert modules["layers/1/conv"].bias.shape == (6,)
    assert set(modules) == set(dict(layers(model)))  # paths stay
    assert model.layers[0].conv.bias is None  # and so does the argument


def test_a_residual_network_is_folded_and_then_equalized(bench, assert_same_function):
    config = ResNetConfig(blocks=(1,), widths=(4,))
    model = bench.draw(lambda: ResNet(config, rngs=nnx.Rngs(0)))
    model.eval()
    x = jax.random.normal(jax.random.key(0), (1, 6, 6, 3))
    folded = FoldBatchNorm().prepare(bench.whole(model))
    assert_same_function(model(x), folded(x))
    inner = Chain([jax.random.normal(jax.random.key(1), (1, 6, 6, 4))], [Rest.of((), {})])
    work = bench.work(folded.layers[0], inner, wiring_of(model), "w4a16")
    before = inner.outputs(work.original)[0]
    CrossLayerEqualization().block(work)
    assert_same_function(before, inner.outputs(work.original)[0])
    first, second = (np.abs(work.matrix(f"conv{i}")) for i in (1, 2))
    rows = second.reshape(9, 4, 4).max((0, 2))  # window positions, channels in, channels out
    np.testing.assert_allclose(first.max(0), rows, rtol=1e-5)  # the ranges have become equal


def test_pairs_of_a_users_own_model(bench, assert_same_function):
    class Grouped(nnx.Module):
        def __init__(self):
            rngs = nnx.Rngs(0)
            self.conv = nnx.Conv(4, 6, (3,), feature_group_count=2, rngs=rngs)
            self.norm = nnx.BatchNorm(6, use_running_average=True, use_bias=False, rngs=rngs)

        def __call__(self, x):
            return self.norm(self.conv(x))

    model, x = bench.draw(Grouped), jax.random.normal(jax.random.key(0), (2, 5, 4))
    folded = FoldBatchNorm(pairs=(("conv", "norm"),)).prepare(bench.whole(model))
    assert_same_function(model(x), folded(x))


def test_an_unfolded_batch_norm_in_a_quantized_block_is_an_error(bench, model):
    blocks = {"layers/0": model.layers[0]}
    schemes = bench.whole(model).schemes
    with pytest.raises(ValueError, match=r"layers/0/norm: an unfolded batch norm .*FoldBatchNorm"):
        check_no_batch_norm(blocks, schemes)
    check_no_batch_norm(blocks, {})  # nothing of it is quantized
    folded = FoldBatchNorm().prepare(bench.whole(model))
    check_no_batch_norm({"layers/0": folded.layers[0]}, schemes)


@pytest.mark.parametrize(
    ("pairs", "error", "text"),
    [
        ((("layers/0/conv", "layers/9/norm"),), ValueError, "has no 'layers/9/norm'"),
        ((("layers/0/conv", "head"),), ValueError, "head is a Linear, no BatchNorm"),
        ((("layers/0", "layers/0/norm"),), NotImplementedError, "behind layers/0, a Stage"),
    ],
)
def test_wrong_pairs_are_refused_by_name(bench, model, pairs, error, text):
    with pytest.raises(error, match=text):
        FoldBatchNorm(pairs=pairs).prepare(bench.whole(model))


def test_a_model_that_names_no_pairs_is_told_of_its_norms(bench, model):
    work = bench.whole(model)
    work.wiring = None
    with pytest.raises(ValueError, match=r"its norms: \['layers/0/norm', 'layers/1/norm'\]"):
        FoldBatchNorm().prepare(work)


def test_statistics_are_those_of_evaluation(bench, model):
    before = np.asarray(model.layers[0].norm.mean[...])
    FoldBatchNorm().prepare(bench.whole(model))
    np.testing.assert_array_equal(model.layers[0].norm.mean[...], before)
