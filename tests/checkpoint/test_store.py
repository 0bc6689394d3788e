"""A model comes back bit for bit, or not at all and with one clear message."""

import functools
import json
import shutil
import subprocess
import sys
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import lowbit_jax as lb
from lowbit_jax.checkpoint import arrays, store, structure
from lowbit_jax.testing import assert_same_bits

PRESETS = sorted(lb.presets)
# One preset of every kind of leaf: zero points and three planes, two levels of scales and a
# statistic, powers of two, a table, a learned scale, scales per stack, one bit.
KINDS = ("w3a16_asym", "nvfp4", "mxfp4", "nf4_g64", "w2a16_lsq", "w1_58a8", "w1a16_pc")
PARTS = ("attention/query", "attention/key", "attention/value", "attention/out")
PARTS += ("mlp/gate", "mlp/up", "mlp/down")


def decoder(layers, *, stacked=False):
    config = lb.models.DecoderConfig(
        vocab=16, dim=128, layers=layers, heads=2, kv_heads=1, head_dim=64, ffn_dim=128,
        max_length=8, stacked=stacked,
    )  # fmt: skip
    return lb.models.Decoder(config, rngs=nnx.Rngs(0))


def quantized_by_parts(presets, *, stacked):
    """A packed decoder in which every linear layer has another preset, as zeros of its shapes."""
    count = 1 if stacked else -(-len(presets) // len(PARTS))
    slots = [
        f"layers/{part}" if stacked else f"layers/{i}/{part}"
        for i in range(count)
        for part in PARTS
    ]
    rules = [lb.Rule(path, name) for path, name in zip(slots, presets, strict=False)]

    def make():
        model = decoder(2 if stacked else count, stacked=stacked)
        return lb.pack_model(lb.quantize_model(model, lb.Recipe(*rules)))

    return nnx.eval_shape(make)


def filled(model):
    """The abstract model with random bytes in every array: each bit has to survive."""
    rng = np.random.default_rng(0)

    def fill(leaf):
        raw = rng.integers(0, 256, leaf.size * leaf.dtype.itemsize, np.uint8)
        return jax.device_put(np.frombuffer(raw.tobytes(), leaf.dtype).reshape(leaf.shape))

    graphdef, state = nnx.split(model)
    return nnx.merge(graphdef, jax.tree.map(fill, state))


def raw_bytes(model):
    """The bytes of every leaf, by path; a comparison of values would lose NaNs' payloads."""
    leaves, _ = jax.tree_util.tree_flatten_with_path(nnx.state(model))
    return {
        jax.tree_util.keystr(path): (x.dtype, x.shape, np.asarray(x).tobytes())
        for path, x in leaves
    }


@pytest.mark.parametrize(
    ("presets", "stacked"),
    [
        pytest.param(PRESETS, False, id="every preset", marks=pytest.mark.slow),
        pytest.param(KINDS, True, id="stacked kinds"),
    ],
)
def test_packed_models_of_every_preset_come_back_bit_for_bit(presets, stacked, tmp_path):
    model = filled(quantized_by_parts(presets, stacked=stacked))
    assert len({t.scheme for _, t in lb.quantized_layers(model)}) == len(
        {lb.presets[name] for name in presets}
    )
    lb.checkpoint.save(tmp_path / "c", model)
    loaded = lb.checkpoint.load(tmp_path / "c")
    assert raw_bytes(loaded) == raw_bytes(model)
    assert lb.recipe_of(loaded) == lb.recipe_of(model)


@pytest.mark.parametrize("kind", ["float", "train"])
def test_float_and_training_models_come_back(kind, model, tmp_path, logits):
    if kind == "train":
        recipe = lb.Recipe(lb.Rule("layers/.*/up", "w4a16_lsq"), lb.Rule("layers/.*", "w1_58a8"))
        model = nnx.jit(lambda m: lb.quantize_model(m, recipe))(model)
    lb.checkpoint.save(tmp_path / "c", model)
    assert lb.checkpoint.read_manifest(tmp_path / "c")["kind"] == kind
    loaded = lb.checkpoint.load(tmp_path / "c")
    assert raw_bytes(loaded) == raw_bytes(model)
    np.testing.assert_array_equal(logits(loaded), logits(model))


def test_loading_makes_no_dense_kernel(saved, packed, monkeypatch):
    dense = {t.freeze_kernel().shape for _, t in lb.quantized_layers(packed)}
    built, asked = [], []

    def build(*args):
        model = lb.models.build(*args)
        built.extend(p.get_value() for p in jax.tree.leaves(nnx.state(model), is_leaf=is_variable))
        return model

    def is_variable(x):
        return isinstance(x, nnx.Variable)

    def reading(folder, target, **options):
        asked.extend(jax.tree.leaves(target))
        return arrays.reading(folder, target, **options)

    monkeypatch.setattr(structure, "build", build)
    monkeypatch.setattr(store, "arrays", types.SimpleNamespace(reading=reading))
    loaded = lb.checkpoint.load(saved)
    assert built
    assert all(isinstance(leaf, jax.core.Tracer) for leaf in built), "only shapes"
    # Words, scales and norms; embedding and head stay float and have other shapes.
    assert asked
    assert not [x for x in asked if x.shape in dense and x.dtype == jnp.float32]
    assert raw_bytes(loaded) == raw_bytes(packed)


def test_a_mesh_gets_its_shards(saved, packed, logits):
    mesh = jax.make_mesh((4, 2), ("fsdp", "tensor"), axis_types=(jax.sharding.AxisType.Auto,) * 2)
    loaded = lb.checkpoint.load(saved, mesh=mesh)
    words = loaded.layers[0].mlp.gate.kernel[...].words[0]
    assert words.shape == (2, 64)
    assert words.sharding.spec == jax.P(None, "tensor")
    assert loaded.head.kernel[...].sharding.spec == jax.P("fsdp", "tensor")
    assert all(len(x.sharding.device_set) == 8 for x in jax.tree.leaves(nnx.state(loaded)))
    assert raw_bytes(loaded) == raw_bytes(packed)


def test_a_fresh_process_needs_the_library_alone(saved, packed, logits):
    program = (
        "import sys, numpy as np, jax, jax.numpy as jnp, lowbit_jax as lb\n"
        f"model = lb.checkpoint.load({str(saved)!r})\n"
        "call = jax.jit(lambda m, t: m(t))\n"
        "print(np.asarray(call(model, jnp.arange(8, dtype=jnp.int32)[None])).tobytes().hex())\n"
        "others = ('lowbit_jax.training', 'experiments', 'jax.experimental.mosaic')\n"
        "print([m for m in sys.modules if m.startswith(others)])\n"
    )
    run = subprocess.run(
        [sys.executable, "-W", "error::UserWarning", "-c", program],
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert run.returncode == 0, run.stderr
    output, more = run.stdout.splitlines()
    assert output == logits(packed).tobytes().hex()
    assert more == "[]"


class Own(nnx.Module):
    """A model of no registered family, with a mask and a dropout's random state."""

    def __init__(self, rngs, features=8):
        self.up = nnx.Linear(32, features, rngs=rngs)
        self.mask = nnx.data(jnp.ones((32,)))
        self.dropout = nnx.Dropout(0.5, rngs=rngs)


@pytest.mark.parametrize("kind", ["float", "train", "packed"])
def test_a_model_of_ones_own_passes_itself_or_its_shapes(kind, tmp_path):
    own = nnx.jit(lambda: Own(nnx.Rngs(0)))()
    steps = {"float": 0, "train": 1, "packed": 2}[kind]
    model = own
    for step in (lambda m: lb.quantize_model(m, "w4a16"), lb.pack_model)[:steps]:
        model = nnx.jit(step)(model)
    lb.checkpoint.save(tmp_path / "c", model)
    with pytest.raises(ValueError, match=r"of no registered family. Pass load\(path, model="):
        lb.checkpoint.load(tmp_path / "c")
    shapes = nnx.eval_shape(lambda: Own(nnx.Rngs(0)))
    for like in (own, shapes, model):
        loaded = lb.checkpoint.load(tmp_path / "c", like)
        assert type(loaded.up) is type(model.up)
        assert_same_bits(
            *(jax.tree.leaves(nnx.state(m, nnx.Not(nnx.RngState))) for m in (loaded, model))
        )
    wrong = nnx.eval_shape(lambda: Own(nnx.Rngs(0), features=4))
    with pytest.raises(
        ValueError, match=r"tensors differ .* the first being up/bias: .*\[8\].*\[4\]"
    ):
        lb.checkpoint.load(tmp_path / "c", wrong)


class NearlyAlike(nnx.Module):
    """Layers of one shape: two are alike, the others differ in what is no number of theirs."""

    def __init__(self, rngs):
        linear = functools.partial(nnx.Linear, 8, 8, rngs=rngs)
        self.layers = nnx.List(
            [
                linear(),
                linear(),
                linear(use_bias=False),
                linear(dtype=jnp.bfloat16),
                linear(precision="highest"),
                linear(kernel_metadata={"role": "another"}),
                nnx.Linear(8, 16, rngs=rngs),
            ]
        )
        self.shared = self.layers[0]


@pytest.mark.parametrize("kind", ["train", "packed"])
def test_layers_that_are_nearly_alike_keep_what_sets_them_apart(kind, tmp_path):
    recipe = lb.Recipe(lb.Rule("layers/1", "w2a16"), lb.Rule(".*", "w4a8"))
    model = lb.quantize_model(NearlyAlike(nnx.Rngs(0)), recipe)
    if kind == "packed":
        model = lb.pack_model(model)
    lb.checkpoint.save(tmp_path / "c", model)
    loaded = lb.checkpoint.load(tmp_path / "c", nnx.eval_shape(lambda: NearlyAlike(nnx.Rngs(0))))
    assert nnx.graphdef(loaded) == nnx.graphdef(model)
    assert loaded.shared is loaded.layers[0]
    assert raw_bytes(loaded) == raw_bytes(model)


class Tied(nnx.Module):
    """Layers that are alike, two of which have one kernel."""

    def __init__(self, rngs):
        self.layers = nnx.List([nnx.Linear(8, 8, rngs=rngs) for _ in range(3)])
        self.layers[2].kernel = self.layers[1].kernel


def test_layers_with_one_kernel_still_share_it(tmp_path):
    model = lb.quantize_model(Tied(nnx.Rngs(0)), "w4a16")
    assert model.layers[2].kernel is model.layers[1].kernel
    lb.checkpoint.save(tmp_path / "c", model)
    loaded = lb.checkpoint.load(tmp_path / "c", nnx.eval_shape(lambda: Tied(nnx.Rngs(0))))
    assert loaded.layers[2].kernel is loaded.layers[1].kernel
    assert raw_bytes(loaded) == raw_bytes(model)


@pytest.fixture
def copied(saved, tmp_path):
    shutil.copytree(saved, tmp_path / "copy")
    return tmp_path / "copy"


def edit(path, **changes):
    manifest = json.loads((path / "manifest.json").read_text())
    manifest.update(changes)
    (path / "manifest.json").write_text(json.dumps(manifest))


def test_an_unknown_family_or_recipe_is_refused_by_name(copied):
    edit(copied, family="encoder")
    with pytest.raises(ValueError, match="no model family 'encoder'"):
        lb.checkpoint.load(copied)
    edit(copied, family="decoder", recipe={"schema": 9, "rules": []})
    with pytest.raises(ValueError, match="schema 9 is not 1"):
        lb.checkpoint.load(copied)


def test_tensors_that_are_not_the_manifests_are_refused(copied):
    manifest = lb.checkpoint.read_manifest(copied)
    edit(copied, config=manifest["config"] | {"ffn_dim": 32})
    with pytest.raises(ValueError, match=r"3 tensors differ .* layers/0/mlp/down/kernel"):
        lb.checkpoint.load(copied)
    other = {"norm/scale": {"shape": [1], "dtype": "int8", "sha256": "0" * 64}}
    edit(copied, config=manifest["config"], tensors=manifest["tensors"] | other)
    with pytest.raises(ValueError, match=r"1 tensors differ .*'shape': \[1\]"):
        lb.checkpoint.load(copied)
