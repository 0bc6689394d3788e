"""Our folders as the libraries of PyTorch read them, and theirs as we do.

uv run pytest -n 0 -m slow tests/peers/test_torch.py
"""

import dataclasses

import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from flax import nnx

import lowbit_jax as lb
from lowbit_jax import formats
from lowbit_jax.data import ByteTokenizer
from lowbit_jax.interop import export_model, load_model
from lowbit_jax.interop.huggingface import NAMES
from lowbit_jax.interop.leaves import leaves_of
from lowbit_jax.interop.weights import layer_name
from lowbit_jax.models import Decoder, DecoderConfig
from lowbit_jax.quantizers import Absmax, MinMax
from lowbit_jax.scale_formats import FLOAT16
from lowbit_jax.scheme import LayerScheme
from lowbit_jax.spec import PerChannel, PerGroup, PerToken, QuantSpec

pytestmark = pytest.mark.slow

CONFIG = DecoderConfig(
    vocab=256, dim=128, layers=2, heads=2, kv_heads=2, ffn_dim=256, max_length=64
)
TOKENS = [[5 * i % 256 for i in range(40)]]
EPS32, EPS16 = 2.0**-24, 2.0**-11


def weights_only(name, group=32):
    fmt = formats.get(name)
    granularity = PerChannel() if group is None else PerGroup(group)
    symmetric = not name.startswith("uint")
    spec = QuantSpec(format=fmt, granularity=granularity, symmetric=symmetric, scale_format=FLOAT16)
    return LayerScheme(weight=Absmax(spec) if symmetric else MinMax(spec))


FP8 = QuantSpec(format=formats.FP8_E4M3)
INT8 = Absmax(QuantSpec(format=formats.INT8, granularity=PerToken()))
SCHEMES = {
    "w4": weights_only("int4"),
    "w4_channel": weights_only("int4", None),
    "w4_asym": weights_only("uint4"),
    "w3": weights_only("int3"),
    "w8": weights_only("int8"),
    "w8a8": LayerScheme(weight=weights_only("int8", None).weight, input=INT8),
    "fp8": LayerScheme(
        weight=Absmax(FP8), input=Absmax(dataclasses.replace(FP8, granularity=PerToken()))
    ),
    "nvfp4": lb.presets["nvfp4a16"],
    "mxfp4": lb.presets["mxfp4"],
    "ternary": lb.presets["w1_58a8"],
}


@pytest.fixture(scope="module")
def decoder():
    return Decoder(CONFIG, rngs=nnx.Rngs(0))


@pytest.fixture(scope="module")
def packed(decoder):
    def make(name):
        recipe = lb.Recipe(lb.Rule(r"layers/\d+/(attention|mlp)/\w+", SCHEMES[name]))
        return lb.pack_model(lb.quantize_model(decoder, recipe))

    return make


def weights(model):
    """Quantized kernels [out, in], dequantized in float32, by their names in the folder."""
    return {
        layer_name(NAMES, leaf.path): leaf.value().T
        for leaf in leaves_of(model)
        if leaf.spec is not None
    }


def assert_weights(found, model, dtype):
    """Bit for bit what ours are in the library's own type, to which both round once."""
    for name, wanted in weights(model).items():
        wanted = wanted.astype(dtype).astype(np.float32)
        np.testing.assert_array_equal(found[name], wanted, err_msg=name)


def logits(model):
    return np.asarray(model(jnp.asarray(TOKENS)))


@pytest.mark.parametrize(
    "scheme", ["w4", "w4_channel", "w4_asym", "w3", "w8", "w8a8", "fp8", "nvfp4", "mxfp4"]
)
def test_compressed_tensors_decompresses_our_weights(torch_reader, packed, tmp_path, scheme):
    model = packed(scheme)
    export_model(model, tmp_path / "out", "compressed-tensors", strict=True)
    found = torch_reader("compressed")(folder=tmp_path / "out")
    dtype = {"float16": np.float16, "bfloat16": ml_dtypes.bfloat16, "float32": np.float32}
    assert_weights(found, model, dtype[str(found["dtype"])])


@pytest.mark.parametrize(
    ("format", "scheme"),
    [
        ("gptq", "w4"), ("gptq", "w4_channel"), ("gptq", "w3"), ("gptq", "w8"),
        ("gptq_v2", "w4"), ("gptq_v2", "w4_asym"), ("awq", "w4"), ("awq", "w4_asym"),
    ],
)  # fmt: skip
def test_gptqmodel_dequantizes_our_weights(torch_reader, packed, tmp_path, format, scheme):
    """Of version 1 it takes asymmetric folders only from itself, since writers disagreed."""
    model = packed(scheme)
    export_model(model, tmp_path / "out", format, tokenizer=ByteTokenizer(), strict=True)
    backend = "AWQ_TORCH" if format == "awq" else "GPTQ_TORCH"
    found = torch_reader("gptq")(folder=tmp_path / "out", backend=backend, tokens=TOKENS)
    assert_weights(found, model, np.float16)
    wanted = logits(lb.dequantize_model(model))
    # It computes in float16: some 30 roundings of activations in a row, which add up at random.
    atol = 30 * EPS16 * np.abs(wanted).max()
    np.testing.assert_allclose(found["logits"], wanted, rtol=0, atol=atol)


def test_transformers_computes_our_dense_folder(torch_reader, decoder, tmp_path):
    export_model(decoder, tmp_path / "out", "safetensors", tokenizer=ByteTokenizer())
    found = torch_reader("logits")(folder=tmp_path / "out", dtype="float32", tokens=TOKENS)
    assert_same_logits(found["logits"], logits(decoder))


def test_transformers_computes_our_fp8_folder(torch_reader, packed, tmp_path):
    """Inputs of layers are rounded to fp8 in both, and float sums have another order there.

    Where the order moves one input over a boundary it moves by up to 1/16, which in turn moves
    others: such a position, and those that look at it, differ as much as rounding itself makes
    them. The others are the same number. What is compared is read from the folder, whose float16
    embedding moves every position of the model that was exported.
    """
    export_model(packed("fp8"), tmp_path / "out", "compressed-tensors", tokenizer=ByteTokenizer())
    found = torch_reader("logits")(folder=tmp_path / "out", dtype="float32", tokens=TOKENS)
    model = load_model(tmp_path / "out", weights="packed").model
    wanted = logits(model)
    difference = np.abs(found["logits"] - wanted)[0].max(axis=-1)
    same = difference < 20 * 16 * EPS32 * np.abs(wanted).max()
    assert same[0]  # it looks at nothing else, and this folder has no flip there
    assert same.mean() > 0.25
    rounding = np.abs(logits(lb.dequantize_model(model)) - wanted).max()
    assert difference.max() < rounding


def assert_same_logits(found, wanted):
    # Sums of up to 256 products in another order, in some 20 layers that follow one another.
    atol = 20 * 16 * EPS32 * np.abs(wanted).max()
    np.testing.assert_allclose(found, wanted, rtol=0, atol=atol)


def test_transformers_loads_our_bitnet(torch_reader, packed, tmp_path):
    model = packed("ternary")
    export_model(model, tmp_path / "out", "bitnet", tokenizer=ByteTokenizer(), strict=True)
    found = torch_reader("logits")(folder=tmp_path / "out", dtype="float16", tokens=TOKENS)
    for name, wanted in weights(model).items():
        # Signs times a scale that is stored in float16: one rounding.
        np.testing.assert_allclose(found[name], wanted, rtol=EPS16, atol=0, err_msg=name)
        assert (np.sign(found[name]) == np.sign(wanted)).all()
    # Both round inputs to int8; where float16 moves one over a boundary, it moves by 1/127. A few
    # in a thousand do, and logits of another model differ by all of their size.
    wanted = logits(model)
    assert np.abs(found["logits"] - wanted).max() < 0.05 * np.abs(wanted).max()


SMALL = {
    "vocab_size": 64, "hidden_size": 32, "num_hidden_layers": 4, "num_attention_heads": 4,
    "num_key_value_heads": 2, "intermediate_size": 48, "max_position_embeddings": 64,
}  # fmt: skip
GEMMA = {"head_dim": 16, "query_pre_attn_scalar": 24, "sliding_window": 6}
LLAMA3 = {
    "rope_type": "llama3", "rope_theta": 1e4, "factor": 8.0, "low_freq_factor": 1.0,
    "high_freq_factor": 4.0, "original_max_position_embeddings": 16,
}  # fmt: skip
FAMILIES = {
    "llama": ("Llama", SMALL),
    "llama tied": ("Llama", SMALL | {"tie_word_embeddings": True, "head_dim": 12}),
    "llama3": ("Llama", SMALL | {"rope_parameters": LLAMA3}),
    "mistral": ("Mistral", SMALL | {"sliding_window": 5, "head_dim": 8}),
    "qwen2": ("Qwen2", SMALL),
    "qwen2 windows": (
        "Qwen2",
        SMALL | {"use_sliding_window": True, "sliding_window": 6, "max_window_layers": 2},
    ),
    "qwen3": ("Qwen3", SMALL | {"head_dim": 12}),
    "gemma2": (
        "Gemma2",
        SMALL | GEMMA | {"attn_logit_softcapping": 4.0, "final_logit_softcapping": 3.0},
    ),
    "gemma3": ("Gemma3", SMALL | GEMMA),
}


def test_folders_of_transformers_have_its_logits_here(torch_reader, tmp_path):
    tokens = [[7 * i % 64 for i in range(24)]]
    found = torch_reader("families")(folder=tmp_path, families=FAMILIES, tokens=tokens)
    for name in FAMILIES:
        model = load_model(tmp_path / name).model
        got = np.asarray(model(jnp.asarray(tokens)))
        wanted = found[name]
        atol = 60 * 8 * EPS32 * np.abs(wanted).max()  # as above, with 4 layers
        np.testing.assert_allclose(got, wanted, rtol=0, atol=atol, err_msg=name)
