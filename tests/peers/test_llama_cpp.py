"""Our GGUF files as llama.cpp reads them.

uv run pytest -n 0 -m slow tests/peers/test_llama_cpp.py
"""

import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import lowbit_jax as lb
from lowbit_jax.data import ByteTokenizer
from lowbit_jax.interop import export_model, load_model
from lowbit_jax.interop.codecs.ggml_blocks import BLOCK_TYPES, decode
from lowbit_jax.interop.ggml_quantize import QUANTIZED, quantize_rows
from lowbit_jax.interop.gguf import GGUFFile
from lowbit_jax.models import Decoder, DecoderConfig

pytestmark = pytest.mark.slow

LINEAR = r"layers/\d+/(attention|mlp)/\w+"
CONFIG = DecoderConfig(
    vocab=256, dim=256, layers=2, heads=4, kv_heads=2, ffn_dim=512, max_length=128
)


def test_stories_go_on_as_in_the_original(llama_reader, assets, tmp_path):
    original = assets / "stories260k" / "stories260K.gguf"
    stories, files = load_model(original), {"original": str(original)}
    for format in ("gguf", "gguf-q8_0", "gguf-q4_0"):
        path = tmp_path / f"{format}.gguf"
        export_model(stories.model, path, format, tokenizer=stories.tokenizer)
        files[format] = str(path)
    # llama.cpp's own files of the original, by its numbers of F16 and Q8_0.
    theirs = {"gguf": 1, "gguf-q8_0": 7}
    made = [
        (str(original), kind, str(tmp_path / f"own-{name}.gguf")) for name, kind in theirs.items()
    ]
    files |= {f"own {name}": path for name, (_, _, path) in zip(theirs, made, strict=True)}
    read = llama_reader("llama")
    found = read(files=files, quantize=made, text="Once upon a time", count=150)
    for format in theirs:
        same = found[f"own {format}.logits"]
        np.testing.assert_array_equal(found[f"{format}.logits"], same, err_msg=format)
    for format in files:
        np.testing.assert_array_equal(found[f"{format}.tokens"], found["original.tokens"])
    assert str(found["gguf.text"]) == str(found["original.text"])
    # 8 bits move a logit by up to 0.4: the story turns at the 112th token, in llama.cpp's own too.
    turn = slice(0, 100)
    np.testing.assert_array_equal(found["gguf-q8_0.made"][turn], found["original.made"][turn])
    assert len(str(found["gguf-q4_0.text"])) > 100, "four bits tell another story, and tell one"


def test_packed_models_have_our_logits(llama_reader, tmp_path):
    schemes = {
        "TQ1_0": ("w1_58a16", "gguf-tq1_0"),
        "TQ2_0": ("w1_58a16", "gguf"),
        "Q4_0": ("w4a16_g32", "gguf"),
        "Q8_0": ("w8a16_g32", "gguf"),
        "MXFP4": ("mxfp4a16", "gguf"),
    }
    decoder, files = Decoder(CONFIG, rngs=nnx.Rngs(0)), {}
    for kind, (scheme, format) in schemes.items():
        recipe = lb.Recipe(lb.Rule(LINEAR, scheme))
        model = lb.pack_model(lb.quantize_model(decoder, recipe))
        files[kind] = str(tmp_path / f"{kind}.gguf")
        export_model(model, files[kind], format, tokenizer=ByteTokenizer())
        assert kind in {tensor.type.name for tensor in GGUFFile(files[kind]).tensors.values()}
    tokens = [7 * i % 256 for i in range(48)]
    found = llama_reader("llama")(files=files, tokens=tokens)
    for kind in files:
        got = found[f"{kind}.logits"]
        # Of the file: "gguf-tq1_0" makes embedding and head ternary, too.
        back = load_model(files[kind]).model
        wanted = np.asarray(back(jnp.asarray([tokens]))[0])
        # It rounds inputs of products to 8 bits in blocks: half a step of 1/127 of the largest in
        # each of K terms, which average out; K is 256 at least, and 14 products follow another.
        error = np.sqrt(np.mean((got - wanted) ** 2) / np.mean(wanted**2))
        assert error < 14 / 127 / np.sqrt(12), (kind, error)


def test_blocks_are_those_of_ggml_in_c(llama_reader, tmp_path):
    """Values of random blocks, and blocks of random values, byte for byte."""
    rng, given, sizes, lengths, raw = np.random.default_rng(0), {}, {}, {}, {}
    for kind, block in BLOCK_TYPES.items():
        values = rng.normal(size=(8, 512)).astype(np.float32)
        if kind in QUANTIZED:
            raw[kind] = np.asarray(quantize_rows(values, kind, where="x")).reshape(-1)
            raw[kind] = raw[kind].view(np.uint8)
            given[f"values {kind}"] = values
            lengths[kind] = raw[kind].size
        else:
            count = values.size // block.elements
            blocks = rng.integers(0, 256, (count, block.size), np.uint8)
            # Scales from 2**-87 to 2**33: XLA takes products below 2**-126 for zeros.
            blocks[:, block.scale_at] = rng.integers(40, 160, count, np.uint8)
            raw[kind] = blocks.reshape(-1)
        given[kind], sizes[kind] = raw[kind], values.size
    np.savez(tmp_path / "given.npz", **given)
    found = llama_reader("ggml")(file=tmp_path / "given.npz", sizes=sizes, bytes=lengths)
    for kind in BLOCK_TYPES:
        ours = decode(raw[kind], (8, 512), kind, where="x").qtensor.dequantize(jnp.float32)
        np.testing.assert_array_equal(found[kind].reshape(8, 512), np.asarray(ours).T, kind)
        if kind in QUANTIZED:
            assert found[f"bytes {kind}"].tobytes() == raw[kind].tobytes(), kind
