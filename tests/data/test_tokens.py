"""One flat array, small, and exactly the text."""

import numpy as np
import pytest

from lowbit_jax.data import ByteTokenizer, Corpus, make_tokenizer, tokenize, tokens

CORPUS = Corpus(
    "test", train=("Grüße", "", "ab\nab ab ab"), valid=("ü",), separator="\n\n", sha256=""
)


def test_tokens_are_the_text_with_a_separator_after_every_document():
    for tokenizer in (ByteTokenizer(), make_tokenizer("train:257", CORPUS)):
        for split, text in (("train", "Grüße\n\n\n\nab\nab ab ab\n\n"), ("valid", "ü\n\n")):
            found = tokenize(CORPUS, tokenizer, split)
            assert tokenizer.decode(found) == text
            assert tokenizer.byte_count(found) == len(text.encode()) == CORPUS.byte_count(split)


def test_chunks_do_not_change_the_tokens(monkeypatch):
    tokenizer = make_tokenizer("train:257", CORPUS)
    whole = tokenize(CORPUS, tokenizer)
    monkeypatch.setattr(tokens, "_CHUNK", 1)
    np.testing.assert_array_equal(tokenize(CORPUS, tokenizer), whole)


@pytest.mark.parametrize(
    ("vocab", "dtype"),
    [(256, "uint8"), (257, "uint16"), (65536, "uint16"), (65537, "int32"), (128_256, "int32")],
)
def test_tokens_take_the_smallest_type(vocab, dtype):
    assert tokens.token_dtype(vocab) == dtype


def test_bytes_take_one_byte_each():
    assert tokenize(CORPUS, ByteTokenizer()).dtype == np.uint8


@pytest.mark.parametrize("wrong", [-1, 10])
def test_a_tokenizer_that_leaves_its_vocabulary_is_an_error(wrong):
    class Wrong:
        vocab = 10

        def encode_batch(self, texts):
            return np.array([3, wrong])

    with pytest.raises(ValueError, match=r"test, split 'valid'.*tokens from .* \[0, 10\)"):
        tokenize(CORPUS, Wrong(), "valid")
