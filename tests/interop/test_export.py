"""A decoder goes out in every format and comes back with the same codes."""

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import lowbit_jax as lb
from lowbit_jax import formats
from lowbit_jax.data.tokenizers import ByteTokenizer
from lowbit_jax.interop import export_model, load_model, table_of
from lowbit_jax.interop.leaves import leaves_of
from lowbit_jax.models import Decoder, DecoderConfig
from lowbit_jax.nn import Packed
from lowbit_jax.quantizers import Absmax, MinMax, StaticAbsmax
from lowbit_jax.recipe import Recipe, Rule
from lowbit_jax.scale_formats import E4M3, FLOAT16
from lowbit_jax.scheme import LayerScheme
from lowbit_jax.spec import PerChannel, PerGroup, PerToken, QuantSpec
from lowbit_jax.surgery import pack_model, quantize_model, quantized_layers

CONFIG = DecoderConfig(
    vocab=256,
    dim=64,
    layers=1,
    heads=2,
    kv_heads=2,
    ffn_dim=96,
    max_length=32,
    norm_eps=2.0**-20,
)
LINEAR = r"layers/\d+/(attention|mlp)/\w+"


def weights_only(name, group=32, symmetric=True, scale_format=FLOAT16):
    granularity = PerChannel() if group is None else PerGroup(group)
    spec = QuantSpec(
        format=formats.get(name),
        granularity=granularity,
        symmetric=symmetric,
        scale_format=scale_format,
    )
    return LayerScheme(weight=Absmax(spec) if symmetric else MinMax(spec))


A8 = Absmax(QuantSpec(format=formats.INT8, granularity=PerToken()))
FP8 = QuantSpec(format=formats.FP8_E4M3)
NVFP4_INPUT = QuantSpec(format=formats.FP4_E2M1, granularity=PerToken(16), scale_format=E4M3)
SCHEMES = {
    "w4": weights_only("int4"),
    "w4_channel": weights_only("int4", None),
    "w4_asym": weights_only("uint4", 32, symmetric=False),
    "w3": weights_only("int3"),
    "w8": weights_only("int8"),
    "w8a8": LayerScheme(weight=weights_only("int8", None).weight, input=A8),
    "fp8": LayerScheme(
        weight=Absmax(FP8), input=Absmax(dataclasses.replace(FP8, granularity=PerToken()))
    ),
    "nvfp4": dataclasses.replace(lb.presets["nvfp4a16"], input=StaticAbsmax(NVFP4_INPUT)),
    "nvfp4a16": lb.presets["nvfp4a16"],
    "mxfp4": lb.presets["mxfp4"],
    "ternary": lb.presets["w1_58a8"],
    "ternary16": weights_only("ternary", 32),
}


@pytest.fixture(scope="module")
def decoder():
    return Decoder(CONFIG, rngs=nnx.Rngs(0))


@pytest.fixture(scope="module")
def packed(decoder):
    """Each scheme's model, packed once."""
    made: dict[str, nnx.Module] = {}

    def make(name):
        if name not in made:
            model = quantize_model(decoder, Recipe(Rule(LINEAR, SCHEMES[name])))
            for _, twin in quantized_layers(model):
                if hasattr(twin, "input_absmax"):
                    twin.input_absmax[...] = jnp.full((1, 1), 3.7, jnp.float32)
            made[name] = pack_model(model)
        return made[name]

    return make


def parts_of(leaf):
    kernel = leaf.kernel()
    q = kernel.qtensor
    found = {f"words {i}": plane for i, plane in enumerate(q.words)}
    found |= {n: getattr(q, n) for n in ("scale", "zero_point", "global_scale")}
    found |= {"order": kernel.input_permutation}
    return {name: np.asarray(value) for name, value in found.items() if value is not None}


def assert_same_model(got, wanted, *, halves=True, codes=True):
    """Every leaf: codes, zero points and scales bit for bit; floats as float16 keeps them."""
    theirs = {leaf.path: leaf for leaf in leaves_of(got)}
    for leaf in leaves_of(wanted):
        other = theirs.pop(leaf.path)
        if leaf.spec is not None and codes:
            assert other.spec == leaf.spec, leaf.path
            mine = parts_of(leaf)
            for name, part in parts_of(other).items():
                if name == "global_scale":  # its reciprocal is stored: each rounds once
                    np.testing.assert_allclose(part, mine[name], rtol=2.0**-23)
                    continue
                assert part.tobytes() == mine[name].tobytes(), (leaf.path, name)
            assert set(parts_of(other)) <= set(mine), leaf.path
        value = leaf.value()
        if leaf.spec is None and halves and (value.ndim > 1 or halves == "all"):
            value = value.astype(np.float16).astype(np.float32)
        two_levels = leaf.spec is not None and leaf.spec.has_global_scale
        rtol = 2.0**-22 if two_levels else 0  # the factor above, and its product with the scale
        np.testing.assert_allclose(other.value(), value, rtol=rtol, atol=0, err_msg=leaf.path)
    assert not theirs


ROUND_TRIPS = [
    ("gptq", "w4"), ("gptq_v2", "w4"), ("gptq", "w4_asym"), ("gptq", "w3"), ("gptq", "w4_channel"),
    ("awq", "w4"), ("awq", "w4_asym"),
    ("compressed-tensors", "w4"), ("compressed-tensors", "w4_asym"), ("compressed-tensors", "w3"),
    ("compressed-tensors", "w8a8"), ("compressed-tensors", "fp8"), ("compressed-tensors", "nvfp4"),
    ("compressed-tensors", "nvfp4a16"), ("compressed-tensors", "mxfp4"), ("bitnet", "ternary"),
]  # fmt: skip


@pytest.mark.parametrize(("format", "scheme"), ROUND_TRIPS)
def test_a_folder_comes_back_with_its_codes(packed, tmp_path, format, scheme):
    model, path = packed(scheme), tmp_path / "out"
    rows = export_model(model, path, format, tokenizer=ByteTokenizer(), strict=True)
    assert not [row for row in rows if row.lost]
    back = load_model(path, weights="packed")
    assert_same_model(back.model, model, halves="all")
    assert back.tokenizer.encode("é: 1\n").tolist() == list("é: 1\n".encode())
    inputs = {path: twin.scheme.input for path, twin in quantized_layers(back.model)}
    wanted = {path: twin.scheme.input for path, twin in quantized_layers(model)}
    assert inputs == wanted
    for path_, twin in quantized_layers(back.model):
        for name, value in twin.state("input").items():
            # 2688 / (2688 / x): two roundings of 2**-24.
            np.testing.assert_allclose(value, 3.7, rtol=2.0**-22, err_msg=f"{path_} {name}")
    # The same numbers, read dequantized.
    dense = load_model(path).model
    assert not list(quantized_layers(dense))
    assert_same_model(dense, back.model, halves=False, codes=False)


@pytest.mark.parametrize("scheme", ["w4", "w8", "mxfp4", "ternary16"])
def test_a_gguf_file_comes_back_with_its_codes(packed, tmp_path, scheme):
    model, path = packed(scheme), tmp_path / "out.gguf"
    rows = export_model(model, path, "gguf", tokenizer=ByteTokenizer(), strict=True)
    back = load_model(path, weights="packed")
    assert back.tokenizer.encode("é: 1\n").tolist() == list("é: 1\n".encode())
    if scheme == "ternary16":  # in groups of 32, which Q4_0 holds as the same integers
        assert {row.now for row in rows if row.was != "float"} == {"Q4_0 codes"}
    # MXFP4's inputs are quantized too, of which GGUF says nothing.
    remarks = {row.why for row in rows if row.was != "float"}
    assert remarks == ({"inputs are the program's own"} if scheme == "mxfp4" else {""})
    assert_same_model(back.model, model, codes=scheme != "ternary16")


def test_a_stacked_model_is_written_layer_by_layer(tmp_path):
    config = dataclasses.replace(CONFIG, stacked=True, layers=2)
    model = Decoder(config, rngs=nnx.Rngs(0))
    model = quantize_model(model, Recipe(Rule(r"layers/(attention|mlp)/\w+", SCHEMES["w4"])))
    export_model(model, tmp_path / "a.gguf", "gguf")
    back = load_model(tmp_path / "a.gguf", weights="packed").model
    assert_same_model(back, model)


@pytest.mark.parametrize(
    "change",
    [
        {"qkv_bias": True},
        {"qk_norm": True, "head_dim": 16},
        {"windows": (8,)},
        {"tied": True, "rope_factors": (2.0,) * 16},
    ],
)
@pytest.mark.parametrize("format", ["gguf", "safetensors"])
def test_families_come_back(tmp_path, change, format):
    config = dataclasses.replace(CONFIG, **change)
    model = Decoder(config, rngs=nnx.Rngs(0))
    export_model(model, tmp_path / "out", format)
    back = load_model(tmp_path / "out").model
    default = {"head_dim": config.head_size}
    assert dataclasses.replace(back.config, **default) == dataclasses.replace(config, **default)
    assert_same_model(back, model, halves=format == "gguf")


def test_factors_of_their_own_stay_in_gguf_and_are_refused_elsewhere(tmp_path):
    config = dataclasses.replace(CONFIG, rope_factors=tuple(1.0 + i for i in range(16)))
    model = Decoder(config, rngs=nnx.Rngs(0))
    export_model(model, tmp_path / "out.gguf", "gguf")
    assert load_model(tmp_path / "out.gguf").model.config.rope_factors == config.rope_factors
    with pytest.raises(NotImplementedError, match=r"rope_factors differ .* GGUF holds"):
        export_model(model, tmp_path / "out", "safetensors")


@pytest.mark.parametrize("format", ["gptq", "compressed-tensors"])
def test_activation_order_comes_back(packed, tmp_path, format):
    model = nnx.clone(packed("w4"))
    rng = np.random.default_rng(0)
    for _, twin in quantized_layers(model):
        k = twin.freeze_kernel().k
        order = np.sort(rng.permutation(k).reshape(-1, 32), axis=1).reshape(-1)
        twin.input_permutation = Packed(jnp.asarray(order, jnp.int32))
    export_model(model, tmp_path / "out", format)
    back = load_model(tmp_path / "out", weights="packed").model
    assert_same_model(back, model, halves="all")
    x = jax.random.normal(jax.random.key(0), (3, CONFIG.dim))
    got, wanted = (m.layers[0].mlp.up(x) for m in (back, lb.dequantize_model(model)))
    # Sums over 64 products in another order.
    scale = float(jnp.abs(wanted).max())
    np.testing.assert_allclose(got, wanted, rtol=0, atol=64 * 2.0**-23 * scale)


def test_what_does_not_fit_is_written_dequantized_and_named(decoder, tmp_path):
    odd = dataclasses.replace(CONFIG, ffn_dim=36)
    spec = LayerScheme(weight=Absmax(QuantSpec(format=formats.INT4, granularity=PerChannel())))
    model = quantize_model(Decoder(odd, rngs=nnx.Rngs(0)), Recipe(Rule(LINEAR, spec)))
    rows = export_model(model, tmp_path / "out.gguf", "gguf")
    lost = {row.path: row for row in rows if row.lost}
    assert set(lost) == {"layers/0/mlp/down/kernel"}
    assert all("rows of 36 in groups of 36" in row.why for row in lost.values())
    scales = [row.why for row in rows if "codes" in row.now]
    assert all(why.startswith("scales rounded to float16 (by up to ") for why in scales)
    table = table_of(rows, tmp_path)
    assert sum("ffn_down" in str(cell) for cell in table.columns[0].cells) == 1
    back = load_model(tmp_path / "out.gguf", weights="packed").model
    dense = {leaf.path: leaf.value() for leaf in leaves_of(pack_model(model))}
    for leaf in leaves_of(back):
        if leaf.path in lost:
            wanted = dense[leaf.path].astype(np.float16).astype(np.float32)
            np.testing.assert_array_equal(leaf.value(), wanted)
    for format in ("gguf", "gptq"):
        with pytest.raises(ValueError, match=r"strict: \d quantized tensors would be .*layers/"):
            export_model(model, tmp_path / "strict", format, strict=True)
    assert {p.name for p in tmp_path.iterdir()} == {"out.gguf"}, "nothing half written is left"


@pytest.mark.parametrize(
    ("format", "scheme", "message"),
    [
        ("gguf", "w4_asym", r"GGUF cannot hold uint4 .* nearest that fits: w4a16_g32"),
        ("gptq", "nvfp4a16", r"GPTQ cannot hold fp4_e2m1"),
        ("gptq", "w8a8", r"gptq quantizes weights alone.*compressed-tensors"),
        ("awq", "w8", r"AWQ cannot hold int8"),
        ("bitnet", "w4", r"BitNet cannot hold int4 .*w1_58a8"),
        ("bitnet", "ternary16", r"cannot hold ternary in groups"),
    ],
)
def test_a_scheme_that_cannot_be_held_is_refused(packed, tmp_path, format, scheme, message):
    with pytest.raises(NotImplementedError, match=message):
        export_model(packed(scheme), tmp_path / "out", format)
    assert not list(tmp_path.iterdir())


def test_wrong_calls_are_refused(decoder, packed, tmp_path):
    with pytest.raises(ValueError, match=r"no format is named 'gptq3'. Nearest: \['gptq"):
        export_model(decoder, tmp_path / "out", "gptq3")
    with pytest.raises(ValueError, match="exists already"):
        export_model(decoder, tmp_path, "safetensors")
    with pytest.raises(ValueError, match=r"no layer of this model can be kept quantized"):
        export_model(decoder, tmp_path / "out", "gptq")
    with pytest.raises(NotImplementedError, match=r"this is a Linear"):
        export_model(nnx.Linear(2, 2, rngs=nnx.Rngs(0)), tmp_path / "out", "gguf")
    gated = dataclasses.replace(CONFIG, sub_norm=True)
    with pytest.raises(NotImplementedError, match=r"no family .* has sub_norm=True"):
        export_model(Decoder(gated, rngs=nnx.Rngs(0)), tmp_path / "out", "gguf")


def test_mixed_schemes_need_a_format_with_groups(decoder, tmp_path):
    recipe = Recipe(Rule(r".*/mlp/down", SCHEMES["w8"]), Rule(LINEAR, SCHEMES["w4"]))
    model = pack_model(quantize_model(decoder, recipe))
    with pytest.raises(NotImplementedError, match=r"one width and one group size.*compressed-t"):
        export_model(model, tmp_path / "out", "gptq")
    export_model(model, tmp_path / "out", "compressed-tensors")
    config = json.loads((tmp_path / "out" / "config.json").read_text())["quantization_config"]
    assert {g["weights"]["num_bits"] for g in config["config_groups"].values()} == {4, 8}
    assert_same_model(load_model(tmp_path / "out", weights="packed").model, model, halves="all")


def test_layers_left_float_are_listed(decoder, tmp_path):
    model = pack_model(quantize_model(decoder, Recipe(Rule(r".*/mlp/\w+", SCHEMES["w4"]))))
    for format, key in (("awq", "modules_to_not_convert"), ("compressed-tensors", "ignore")):
        export_model(model, tmp_path / format, format)
        config = json.loads((tmp_path / format / "config.json").read_text())
        listed = config["quantization_config"][key]
        assert "model.layers.0.self_attn.q_proj" in listed
        assert "model.layers.0.mlp.up_proj" not in listed
    export_model(model, tmp_path / "gptq", "gptq")
    back = load_model(tmp_path / "gptq", weights="packed").model
    assert_same_model(back, model, halves="all")
