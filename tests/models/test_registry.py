"""A model can be made again from its family's name and a JSON object."""

import json

import jax
import pytest
from flax import nnx

from lowbit_jax.models import (
    CNN,
    MLP,
    CNNConfig,
    Decoder,
    DecoderConfig,
    LeNet,
    LeNetConfig,
    MLPConfig,
    build,
    family_of,
    register,
)

DECODER = DecoderConfig(vocab=8, dim=8, layers=1, heads=2, kv_heads=1, ffn_dim=8, max_length=4)
CASES = [
    ("decoder", Decoder, DECODER),
    ("mlp", MLP, MLPConfig(3, (4, 5), 2)),
    ("cnn", CNN, CNNConfig(3, (4,), 2)),
    ("lenet", LeNet, LeNetConfig(size=8, channels=(2,), hidden=3)),
]


@pytest.mark.parametrize(("family", "cls", "config"), CASES, ids=[case[0] for case in CASES])
def test_a_model_survives_the_way_through_json(family, cls, config):
    model = nnx.eval_shape(lambda: cls(config, rngs=nnx.Rngs(0)))
    name, fields = family_of(model)
    assert name == family
    assert json.loads(json.dumps(fields)) == fields
    again = nnx.eval_shape(lambda: build(name, json.loads(json.dumps(fields)), nnx.Rngs(0)))
    assert type(again) is cls
    assert again.config == config
    assert nnx.graphdef(again) == nnx.graphdef(model)
    assert jax.tree.map(lambda a: (a.shape, a.dtype), nnx.to_pure_dict(nnx.state(again))) == (
        jax.tree.map(lambda a: (a.shape, a.dtype), nnx.to_pure_dict(nnx.state(model)))
    )


def test_a_model_is_of_the_family_of_its_class_whatever_its_layers_are():
    class Small(MLP):
        pass

    with pytest.raises(ValueError, match=r"Small is not a registered model family"):
        family_of(nnx.eval_shape(lambda: Small(MLPConfig(1, (), 1), rngs=nnx.Rngs(0))))

    model = nnx.eval_shape(lambda: MLP(MLPConfig(3, (4,), 2), rngs=nnx.Rngs(0)))
    model.head = nnx.Sequential(model.head)
    name, fields = family_of(model)
    assert name == "mlp"
    assert (fields["in_features"], fields["hidden"], fields["out_features"]) == (3, [4], 2)


@pytest.mark.parametrize(
    ("family", "config", "message"),
    [
        (
            "llama",
            {},
            r"family 'llama'. Registered: \['cnn', 'decoder', 'lenet', 'mlp', 'resnet'\]",
        ),
        ("mlp", {"in_feature": 3}, r"no fields \['in_feature'\]. Did you mean 'in_features'\?"),
        ("mlp", {"in_features": 3}, r"needs the fields \['hidden', 'out_features'\]"),
        (
            "mlp",
            {"in_features": 3, "hidden": [0], "out_features": 2},
            r"hidden=\(0,\) must be made of integers",
        ),
    ],
)
def test_what_cannot_be_built_is_refused_with_what_could(family, config, message):
    with pytest.raises(ValueError, match=message):
        build(family, config, nnx.Rngs(0))


def test_a_class_that_is_no_family_is_refused():
    with pytest.raises(ValueError, match=r"'mlp' is taken by MLP; register .*Other"):

        @register("mlp")
        class Other(nnx.Module):
            def __init__(self, config: MLPConfig, *, rngs: nnx.Rngs):
                self.config = config

    with pytest.raises(TypeError, match=r"annotates `config` with its dataclass; found None"):

        @register("nameless")
        class Nameless(nnx.Module):
            def __init__(self, size: int, *, rngs: nnx.Rngs):
                self.size = size

    with pytest.raises(ValueError, match=r"no model family 'nameless'"):
        build("nameless", {}, nnx.Rngs(0))
