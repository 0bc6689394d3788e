"""Swapping layers: what changes, what stays, and what is refused."""

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import lowbit_jax as lb
from lowbit_jax import surgery
from lowbit_jax.testing import assert_same_bits

STATIC = lb.StaticAbsmax(lb.QuantSpec(format=lb.INT8_NARROW, granularity=lb.PerTensor()))


ACTIVATIONS = lb.LayerScheme(input=STATIC)


def init(key, shape, dtype):
    return jnp.asarray(np.random.default_rng(len(shape)).normal(size=shape), dtype)


Linear = functools.partial(nnx.Linear, kernel_init=init)


class Block(nnx.Module):
    def __init__(self, rngs):
        self.norm = nnx.LayerNorm(32, rngs=rngs)
        self.up = Linear(32, 16, rngs=rngs, kernel_metadata={"note": "kept"})
        self.down = Linear(16, 32, rngs=rngs)

    def __call__(self, x):
        return x + self.down(nnx.relu(self.up(self.norm(x))))


class Toy(nnx.Module):
    """Layers in a List, a Dict, a Sequential, plain containers, and one in two places."""

    def __init__(self, rngs):
        self.embed = nnx.Embed(8, 32, embedding_init=init, rngs=rngs)
        self.layers = nnx.List([Block(rngs), Block(rngs)])
        self.named = nnx.Dict(a=Linear(32, 32, rngs=rngs))
        self.chain = nnx.Sequential(Linear(32, 32, rngs=rngs), nnx.relu)
        self.plain = nnx.data({"b": Linear(32, 32, rngs=rngs), "c": [Linear(32, 32, rngs=rngs)]})
        self.pair = nnx.data((Linear(32, 32, rngs=rngs), None))
        self.again = self.named["a"]
        self.head = Linear(32, 8, rngs=rngs)

    def __call__(self, tokens):
        x = self.embed(tokens)
        for layer in self.layers:
            x = layer(x)
        x = self.chain(self.named["a"](x)) + self.again(x)
        return self.head(self.pair[0](self.plain["c"][0](self.plain["b"](x))))


INNER = [
    "chain/layers/0",
    "layers/0/down",
    "layers/0/up",
    "layers/1/down",
    "layers/1/up",
    "pair/0",
    "plain/b",
    "plain/c/0",
]


@pytest.fixture(scope="module")
def toy():
    return Toy(nnx.Rngs(0))


def variables(model):
    return dict(nnx.to_flat_state(nnx.state(model)))


def snapshot(model):
    """A copy of the bytes of every variable."""
    return {
        "/".join(map(str, path)): jax.tree.map(np.array, v[...])
        for path, v in variables(model).items()
    }


call = nnx.jit(lambda model, tokens: model(tokens))


def paths(model):
    return sorted(path for path, _ in lb.quantized_layers(model))


def test_a_preset_means_every_layer_but_embedding_and_head(toy):
    model = lb.quantize_model(toy, "w4a16")
    shared = {"again", "named/a"} & set(paths(model))
    assert len(shared) == 1  # one layer, under its first path
    assert paths(model) == sorted([*INNER, *shared])
    assert isinstance(model.again, lb.nn.QLinear)
    assert model.again is model.named["a"]
    assert type(model.head) is nnx.Linear


def test_parameter_paths_and_metadata_stay_and_scales_are_added(toy):
    before = variables(toy)
    model = lb.quantize_model(
        toy, lb.Recipe(lb.Rule("layers/.*", "w4a16_lsq"), lb.Rule(".*", "w4a16"))
    )
    after = variables(model)
    added = {"/".join(map(str, path)) for path in set(after) - set(before)}
    assert set(before) <= set(after)
    assert added == {f"layers/{i}/{name}/kernel_scale" for i in (0, 1) for name in ("up", "down")}
    for path, variable in before.items():
        assert type(after[path]) is type(variable)
        assert after[path][...] is variable[...], "the arrays are shared"
    assert model.layers[0].up.kernel.note == "kept"


def test_the_argument_is_left_as_it_was_and_shares_no_variable(toy):
    model = toy
    recipe = lb.Recipe(lb.Rule("layers/0/up|named/a|again", "w4a16"))
    changes = (lambda m: lb.quantize_model(m, recipe), lb.pack_model, lb.dequantize_model)
    for change in changes:
        before, structure = snapshot(model), str(nnx.graphdef(model))
        new = change(model)
        assert str(nnx.graphdef(model)) == structure
        assert_same_bits(snapshot(model), before)
        theirs = {id(v) for _, v in nnx.iter_graph(model) if isinstance(v, nnx.Variable)}
        ours = {id(v) for _, v in nnx.iter_graph(new) if isinstance(v, nnx.Variable)}
        assert not ours & theirs
        # Training the new model does not move the old one.
        nnx.update(new, jax.tree.map(lambda x: x + 1, nnx.state(new, nnx.Param)))
        assert_same_bits(snapshot(model), before)
        model = change(model)


@pytest.fixture(scope="module")
def packed(toy):
    return nnx.jit(lambda m: lb.pack_model(lb.quantize_model(m, "w1_58a16")))(toy)


def test_a_packed_model_has_no_float_kernels_and_the_same_paths(toy, packed):
    assert set(variables(packed)) == set(variables(toy))
    kernels = [v for p, v in variables(packed).items() if p[-1] == "kernel" and p[0] != "head"]
    assert all(isinstance(v, lb.Packed) and isinstance(v[...], lb.QTensor) for v in kernels)
    assert packed.again is packed.named["a"]
    params = nnx.state(packed, nnx.Param)
    assert not [p for p, _ in nnx.to_flat_state(params) if p[-1] == "kernel" and p[0] != "head"]
    assert "QTensor(ternary, shape=(32, 16)" in repr(packed)


def test_dequantize_gives_plain_layers_with_the_quantized_values(toy, packed):
    tokens = jnp.arange(8)[None]
    plain = nnx.jit(lb.dequantize_model)(packed)
    assert not paths(plain)
    assert set(variables(plain)) == set(variables(toy))
    assert_same_bits(call(plain, tokens), call(packed, tokens))
    quantized = lb.quantize_model(toy, "w1_58a16")
    assert_same_bits(call(quantized, tokens), call(packed, tokens), "packed against trained")
    again = nnx.jit(lb.dequantize_model)(quantized)
    assert jax.tree.structure(nnx.state(again)) == jax.tree.structure(nnx.state(toy))
    assert_same_bits(again.layers[0].up.kernel[...], plain.layers[0].up.kernel[...])


def test_the_recipe_of_a_model_makes_it_again(toy):
    recipe = lb.Recipe(
        lb.Rule("layers/0/.*", "w4a16"), lb.Rule("layers/1/up", None), lb.Rule("layers/.*", "w8a8")
    )
    model = lb.quantize_model(toy, recipe)
    again = lb.quantize_model(toy, lb.recipe_of(model))
    assert [(p, t.scheme) for p, t in lb.quantized_layers(again)] == [
        (p, t.scheme) for p, t in lb.quantized_layers(model)
    ]
    assert lb.recipe_of(toy) is None


def test_calibration_changes_statistics_only(toy):
    scheme = lb.LayerScheme(lb.presets["w1_58a16"].weight, STATIC)
    model = lb.quantize_model(toy, lb.Recipe(lb.Rule("layers/.*|head", scheme)))
    before = snapshot(model)
    batches = [jnp.arange(4)[None], jnp.arange(8)[None]]
    seen = []
    same = lb.calibrate_model(model, batches, lambda m, b: seen.append(b.shape) or m(b))
    assert same is model
    assert seen == [(1, 4), (1, 8)]  # one trace per shape
    for path, variable in variables(model).items():
        value = np.asarray(variable[...])
        if isinstance(variable, lb.QuantStat):
            assert path[-1] == "input_absmax"
            assert np.isnan(before["/".join(map(str, path))]).all()
            assert np.isfinite(value).all()
        else:
            assert_same_bits(value, before["/".join(map(str, path))])
    after = snapshot(model)
    call(model, jnp.arange(8)[None] * 0)
    assert_same_bits(snapshot(model), after, "after evaluation")
    assert not any(t.calibrating for _, t in lb.quantized_layers(model))


def test_a_failing_calibration_leaves_the_model_in_evaluation(toy):
    model = lb.quantize_model(toy, lb.Recipe(lb.Rule("head", lb.LayerScheme(None, STATIC))))

    def broken(model, batch):
        raise RuntimeError("no such batch")

    with pytest.raises(RuntimeError, match="no such batch"):
        lb.calibrate_model(model, [jnp.zeros(1)], broken)
    assert not model.head.calibrating
    with pytest.raises(ValueError, match="no batch"):
        lb.calibrate_model(model, [])
    assert lb.calibrate_model(toy, [None]) is toy  # nothing to calibrate: the batches are not read


class Odd(nnx.Module):
    def __init__(self, rngs):
        self.up = nnx.ConvTranspose(4, 4, (3,), rngs=rngs)
        self.proj = Linear(96, 4, rngs=rngs)


def rules(*pairs):
    return lb.Recipe(*(lb.Rule(*pair) for pair in pairs))


REFUSED = {
    "a rule that matches nothing": (
        lambda m: lb.quantize_model(m, rules(("layer/.*", "w4a16"))), ValueError,
        r"the rule 'layer/\.\*' matches no layer\. Nearest paths: \['layers/\d",
    ),
    "a rule that is shadowed": (
        lambda m: lb.quantize_model(m, rules(("layers/.*", None), ("layers/0/up", "w4a16"))),
        ValueError, r"'layers/0/up' never decides.*\(layers/0/up by 'layers/\.\*'\)",
    ),
    "groups that do not divide": (
        lambda m: lb.quantize_model(m, rules(("layers/0/down", "w4a16_g32"))), ValueError,
        r"^layers/0/down: input axis of length 16 does not split into groups of 32 "
        r"\(16 = 0 \* 32 \+ 16\)\. Group sizes that fit: \[16, 8\]",
    ),
    "groups of the input that do not divide": (
        lambda m: lb.quantize_model(m, rules(("layers/0/down", lb.LayerScheme(
            input=lb.presets["mxfp4"].input)))),
        ValueError, r"^layers/0/down: .*length 16 does not split into groups of 32",
    ),
    "a quantized model": (
        lambda m: lb.quantize_model(lb.quantize_model(m, "w4a16"), "w4a16"), ValueError,
        r"and 8 more layers are quantized already\. Start from the float model",
    ),
    "an unknown preset": (
        lambda m: lb.quantize_model(m, "w4a16_g31"), ValueError, r"Nearest: \['w4a16_g3",
    ),
    "packing a float model": (
        lb.pack_model, ValueError, "no layer of this model is quantized. Call quantize_model",
    ),
    "packing what was never calibrated": (
        lambda m: lb.pack_model(lb.quantize_model(m, rules(("head", ACTIVATIONS)))),
        ValueError, r"^head/input_absmax: this range was never calibrated.*calibrate_model",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", REFUSED)
def test_it_refuses_with_path_numbers_and_fix(name, toy):
    act, error, message = REFUSED[name]
    with pytest.raises(error, match=message):
        act(toy)


def test_a_layer_without_a_twin_is_refused_unless_a_rule_leaves_it_float():
    odd = Odd(nnx.Rngs(0))
    with pytest.raises(
        NotImplementedError, match=r"^up: a ConvTranspose matched .* has no quantized twin"
    ) as caught:
        lb.quantize_model(odd, "w4a16")
    fix = re.search(r"Rule\(('.*'), None\)", str(caught.value)).group(1)
    model = lb.quantize_model(odd, rules((fix.strip("'"), None), (".*", "w4a16")))
    assert paths(model) == ["proj"]


def test_nan_and_infinite_kernels_are_not_packed():
    layer = Linear(16, 4, rngs=nnx.Rngs(0))
    layer.kernel[...] = layer.kernel[...].at[0, :3].set(jnp.array([jnp.nan, jnp.inf, 1.0]))
    model = lb.quantize_model(nnx.List([layer]), "w4a16")
    with pytest.raises(ValueError, match=r"^0/kernel: 2 of 64 values are NaN or infinite"):
        lb.pack_model(model)


def test_a_model_of_embedding_and_head_alone_needs_a_recipe():
    class Tiny(nnx.Module):
        def __init__(self, rngs):
            self.embed, self.lm_head = nnx.Embed(4, 4, rngs=rngs), Linear(4, 4, rngs=rngs)

    with pytest.raises(ValueError, match=r"has no other: \['embed', 'lm_head'\]. Give a Recipe"):
        lb.quantize_model(Tiny(nnx.Rngs(0)), "w4a16")
    with pytest.raises(ValueError, match="no layer with a weight matrix"):
        lb.quantize_model(nnx.List([nnx.LayerNorm(4, rngs=nnx.Rngs(0))]), "w4a16")


def test_norms_and_biases_are_no_candidates_even_when_stacked():
    def make(rngs):
        return nnx.List([Linear(4, 4, rngs=rngs), nnx.RMSNorm(4, rngs=rngs)])

    stacked = nnx.eval_shape(lambda: nnx.vmap(make)(nnx.Rngs(0).split(3)))
    assert stacked[1].scale.get_value().ndim == 2
    assert [surgery.is_candidate(m) for m in (stacked, *stacked)] == [False, True, False]
    biased = nnx.eval_shape(lambda: nnx.LinearGeneral(4, (2, 2), rngs=nnx.Rngs(0)))
    assert biased.bias.get_value().ndim == 2
    assert surgery.is_candidate(biased)


def test_a_single_layer_is_a_model():
    layer = Linear(16, 4, rngs=nnx.Rngs(0))
    model = lb.quantize_model(layer, "w4a16")
    assert paths(model) == [""]
    assert type(lb.quantize_model(layer, lb.recipe_of(model))) is lb.nn.QLinear
