"""LLM-QAT's data: greedy beginnings, drawn endings, the same from the same key."""

import dataclasses

import jax
import numpy as np
import pytest
from flax import nnx

import lowbit_jax as lb
from experiments.self_generate import write
from lowbit_jax.data import load_corpus
from lowbit_jax.data.tokenizers import ByteTokenizer
from lowbit_jax.generation.self_generated import generated_documents, generated_tokens
from lowbit_jax.models import Decoder, DecoderConfig

CONFIG = DecoderConfig(
    vocab=256, dim=16, layers=1, heads=2, kv_heads=1, ffn_dim=16, max_length=12, tied=True
)
KEY = jax.random.key(0)


@pytest.fixture(scope="module")
def model():
    graphdef, state = nnx.split(nnx.eval_shape(lambda: Decoder(CONFIG, rngs=nnx.Rngs(0))))
    rng = np.random.default_rng(0)

    def draw(path, leaf):
        value = 1.0 if path[-1] == "scale" else rng.normal(size=leaf.shape) / 4
        return leaf.replace(np.full(leaf.shape, value, np.float32))

    return nnx.merge(graphdef, jax.device_put(nnx.map_state(draw, state)))


@pytest.fixture(scope="module")
def tokens(model):
    return np.concatenate(list(generated_tokens(model, 7, 12, key=KEY, greedy=3, batch=4)))


def test_documents_begin_with_the_most_likely_tokens_and_go_on_with_drawn_ones(model, tokens):
    assert tokens.shape == (7, 12)
    assert len(set(tokens[:, 0])) > 3  # of 256, seven in uniform draws
    likely = np.asarray(jax.jit(lambda m, t: m(t))(model, tokens)).argmax(-1)
    np.testing.assert_array_equal(tokens[:, 1:4], likely[:, :3])
    # A drawn token is the most likely one rarely: the model is random, and has 256.
    assert (tokens[:, 4:] == likely[:, 3:-1]).mean() < 0.5


def test_a_document_does_not_depend_on_how_many_follow(model, tokens):
    few = np.concatenate(list(generated_tokens(model, 5, 12, key=KEY, greedy=3, batch=4)))
    np.testing.assert_array_equal(few, tokens[:5])


def test_tokens_that_the_tokenizer_does_not_have_are_left_out(model):
    class Small(ByteTokenizer):
        vocab = 8

        def decode(self, tokens):
            assert (tokens < 8).all()
            return super().decode(tokens)

    texts = list(generated_documents(model, Small(), 4, 12, key=KEY, greedy=3, batch=4))
    assert all(0 < len(text) < 12 for text in texts)


def test_the_command_writes_a_source_of_text(model, tokens, tmp_path):
    lb.checkpoint.save(
        tmp_path / "teacher",
        model,
        metadata={"separator": "\n\n"},
        tokenizer=ByteTokenizer().to_json(),
    )
    out = tmp_path / "text.txt"
    numbers = {"documents": 7, "length": 0, "greedy": 3, "batch": 4, "seed": 0}
    write(str(tmp_path / "teacher"), out, **numbers)
    expected = [ByteTokenizer().decode(row) for row in tokens]
    assert out.read_bytes().decode() == "".join(text + "\n\n" for text in expected)
    corpus = load_corpus(f"text:{out}", valid_fraction=0.3)
    assert corpus.byte_count("train") > 0
    assert [path.name for path in tmp_path.iterdir() if path.is_file()] == ["text.txt"]
    with pytest.raises(ValueError, match=r"exists\. Name a new file"):
        write(str(tmp_path / "teacher"), out, **numbers)


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        ({"documents": 0}, "documents=0"),
        ({"length": 4}, r"length=4 is not in \[5, 12\]"),
        ({"length": 13}, r"length=13 is not in \[5, 12\]"),
        ({"greedy": -1}, "greedy=-1"),
        ({"first": 256}, "first=256 is no token"),
    ],
)
def test_numbers_that_do_not_fit_are_refused_at_once(arguments, says):
    model = nnx.eval_shape(lambda: Decoder(dataclasses.replace(CONFIG), rngs=nnx.Rngs(0)))
    with pytest.raises(ValueError, match=says):
        generated_tokens(
            model, **{"documents": 1, "length": 8, "greedy": 3, "key": KEY} | arguments
        )
