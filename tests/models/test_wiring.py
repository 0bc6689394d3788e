"""The wiring of the library's models names what is there."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from lowbit_jax.models import CNN, MLP, CNNConfig, Decoder, DecoderConfig, MLPConfig
from lowbit_jax.models.resnet import ResNet, ResNetConfig
from lowbit_jax.models.wiring import untied, wiring_of, with_structure
from lowbit_jax.walk import layers

FLAGS = [{}, {"sub_norm": True}, {"tied": True, "qk_norm": True}, {"post_norm": True}]


def abstract(**changes):
    config = DecoderConfig(
        vocab=8, dim=8, layers=2, heads=2, kv_heads=1, ffn_dim=12, max_length=4, **changes
    )
    return nnx.eval_shape(lambda: Decoder(config, rngs=nnx.Rngs(0)))


@pytest.mark.parametrize("changes", FLAGS, ids=str)
def test_every_path_of_the_decoders_wiring_exists(changes):
    model = abstract(**changes)
    wiring = wiring_of(model)
    blocks, whole = dict(layers(model.layers[1])), dict(layers(model))
    inside = [
        *itertools.chain.from_iterable((link.source, *link.targets) for link in wiring.links),
        *wiring.writers,
        *wiring.post_norms,
        *itertools.chain.from_iterable((norm, *paths) for norm, paths in wiring.readers),
        wiring.outputs,
        wiring.hidden,
    ]
    assert set(inside) <= set(blocks)
    assert wiring.embedding in whole
    assert wiring.head[0] in whole
    assert (wiring.head[1] is None) == model.config.tied


def test_links_have_matching_widths():
    """The target reads each feature of the source `repeats` times."""
    model = abstract()
    modules = dict(layers(model.layers[0]))
    for link in wiring_of(model).links:
        source = modules[link.source]
        width = source.num_features if "norm" in link.source else source.out_features
        for path in link.targets:
            assert modules[path].in_features == link.repeats * width


@pytest.mark.parametrize(
    "make",
    [
        lambda: CNN(CNNConfig(in_channels=1, channels=(2, 3), out_features=2), rngs=nnx.Rngs(0)),
        lambda: ResNet(ResNetConfig(blocks=(1, 2), widths=(2, 4)), rngs=nnx.Rngs(0)),
    ],
    ids=["cnn", "resnet"],
)
def test_every_batch_norm_stands_behind_its_convolution(make):
    model = nnx.eval_shape(make)
    modules, pairs = dict(layers(model)), wiring_of(model).batch_norms
    for layer, norm in pairs:
        assert modules[layer].out_features == modules[norm].num_features
    norms = {path for path, module in modules.items() if isinstance(module, nnx.BatchNorm)}
    assert {norm for _, norm in pairs} == norms


def test_other_models_have_none_and_cannot_be_untied():
    model = nnx.eval_shape(lambda: MLP(MLPConfig(2, (3,), 2), rngs=nnx.Rngs(0)))
    assert wiring_of(model) is None
    with pytest.raises(NotImplementedError, match="MLP: its head is tied"):
        untied(model)


def test_an_untied_decoder_computes_the_same():
    graphdef, state = nnx.split(abstract(tied=True))
    state = jax.tree.map(lambda x: jnp.cos(jnp.arange(x.size) * 0.7).reshape(x.shape), state)
    model = nnx.merge(graphdef, state)
    tokens = jnp.array([[1, 5, 2]])
    np.testing.assert_allclose(untied(model)(tokens), model(tokens), rtol=1e-5, atol=1e-5)
    assert model.config.tied
    assert not untied(model).config.tied


def test_structure_is_told_only_where_the_family_has_the_field():
    model = abstract()
    assert with_structure(model, tied=True).config.tied
    assert with_structure(model, folded_everything=True).config == model.config
