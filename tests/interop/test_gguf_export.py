"""Our GGUF files, for others to read: the `gguf` package's reader, and the original they are of."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from lowbit_jax.data.corpus import Corpus
from lowbit_jax.data.tokenizers import train_bpe
from lowbit_jax.interop import export_model, load_model
from lowbit_jax.interop.gguf import GGUFFile
from lowbit_jax.interop.gguf_tokenizer_export import tokenizer_metadata
from lowbit_jax.interop.gguf_tokenizers import tokenizer_of
from lowbit_jax.interop.hf_tokenizers import byte_characters

TEXT = "Once upon a time, there was a little girl named Lily. It's 1 2 34567 é €\n"


@pytest.fixture(scope="module")
def stories(assets):
    return load_model(assets / "stories260k" / "stories260K.gguf")


def rounded(model):
    """The model with its matrices as float16 keeps them."""
    graphdef, state = nnx.split(model)

    def half(leaf):
        return leaf.astype(jnp.float16).astype(jnp.float32) if leaf.ndim > 1 else leaf

    return nnx.merge(graphdef, jax.tree.map(half, state))


def test_f16_of_stories_has_identical_logits(stories, tmp_path):
    path = tmp_path / "f16.gguf"
    export_model(stories.model, path, "gguf", tokenizer=stories.tokenizer)
    back = load_model(path)
    tokens = jnp.asarray(stories.tokenizer.encode(TEXT[:53]))[None]
    assert back.tokenizer.encode(TEXT[:53]).tolist() == tokens[0].tolist()
    np.testing.assert_array_equal(back.model(tokens), rounded(stories.model)(tokens))
    assert (back.tokenizer.bos, back.tokenizer.eos) == (1, 2)


@pytest.mark.parametrize("type", ["F16", "Q8_0", "Q4_0"])
def test_the_gguf_package_reads_what_we_write(stories, tmp_path, type):
    gguf = pytest.importorskip("gguf", reason="the gguf package (dependency group dev)")
    path = tmp_path / "out.gguf"
    format = "gguf" if type == "F16" else f"gguf-{type.lower()}"
    export_model(stories.model, path, format, tokenizer=stories.tokenizer)
    reader, ours = gguf.GGUFReader(path), GGUFFile(path)
    assert [tensor.name for tensor in reader.tensors] == list(ours.tensors)
    for tensor in reader.tensors:
        mine = ours.tensors[tensor.name]
        assert (tensor.tensor_type.name, tuple(tensor.shape[::-1])) == (mine.type.name, mine.shape)
        values = gguf.quants.dequantize(tensor.data, tensor.tensor_type)
        np.testing.assert_array_equal(values.reshape(mine.shape), ours.read(tensor.name))
        if mine.type.name in ("Q8_0", "Q4_0"):
            assert tensor.data.tobytes() == ours.raw(tensor.name).tobytes()
    kinds = {tensor.tensor_type.name for tensor in reader.tensors}
    assert kinds == {"F32", "F16", type}
    field = reader.fields["tokenizer.ggml.tokens"]
    assert len(field.data) == 512


def test_a_quantized_file_is_what_the_package_quantizes(stories, tmp_path, assets):
    """From the original's float tensors: ggml's bytes."""
    gguf = pytest.importorskip("gguf", reason="the gguf package (dependency group dev)")
    original = GGUFFile(assets / "stories260k" / "stories260K.gguf")
    path = tmp_path / "q8.gguf"
    export_model(stories.model, path, "gguf-q8_0")
    ours = GGUFFile(path)
    for name, tensor in ours.tensors.items():
        if tensor.type.name == "Q8_0":
            wanted = gguf.quants.quantize(original.read(name), gguf.GGMLQuantizationType.Q8_0)
            assert ours.raw(name).tobytes() == wanted.tobytes(), name


def test_tokens_of_sentencepiece_keep_their_types_and_order(stories, assets):
    original = GGUFFile(assets / "stories260k" / "stories260K.gguf").metadata
    written = tokenizer_metadata(stories.tokenizer)
    key = "tokenizer.ggml."
    assert written[key + "tokens"] == original[key + "tokens"]
    # Types: 6 is a byte, 3 a control token, 2 the unknown one.
    types, wanted = written[key + "token_type"], original[key + "token_type"]
    np.testing.assert_array_equal(types[3:], wanted[3:])
    back = tokenizer_of(written, "written")
    assert back.encode(TEXT).tolist() == stories.tokenizer.encode(TEXT).tolist()


def test_a_trained_bpe_comes_back():
    corpus = Corpus("test", (TEXT * 4,), (TEXT,), separator="<|end|>", sha256="")
    tokenizer = train_bpe(corpus, 280)
    back = tokenizer_of(tokenizer_metadata(tokenizer), "written")
    assert back.encode(TEXT).tolist() == tokenizer.encode(TEXT).tolist()
    assert back.vocab == 280


def test_byte_characters_are_those_of_the_library():
    import tokenizers

    assert set(byte_characters()) == set(tokenizers.pre_tokenizers.ByteLevel.alphabet())
    cut = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    for text in ("a\n\t é", "\x00\x7f\xad"):
        ((piece, _),) = cut.pre_tokenize_str(text)
        assert piece == "".join(byte_characters()[byte] for byte in text.encode())
