"""Tokenizers lose nothing, are the same every time, and travel as JSON."""

import json

import numpy as np
import pytest
import tokenizers
from hypothesis import given
from hypothesis import strategies as st

from lowbit_jax.data import ByteTokenizer, Corpus, make_tokenizer, tokenize, tokenizer_from_json

WORDS = ("the cat sat on the mat with a hat, and thé cät sat — that is that.\n" * 3).split(" ")
SEPARATOR = "<|end|>"


def corpus_of(*documents, separator=SEPARATOR):
    return Corpus("test", train=documents, valid=("sat",), separator=separator, sha256="")


CORPUS = corpus_of(" ".join(WORDS), " ".join(reversed(WORDS)))


@pytest.fixture(scope="module")
def bpe():
    return make_tokenizer("train:280", CORPUS)


def word_level(unk="[UNK]", **options):
    vocab = {unk: 0, "a": 1, "b": 2, " ": 3}
    engine = tokenizers.Tokenizer(tokenizers.models.WordLevel(vocab, unk_token=unk))
    engine.pre_tokenizer = tokenizers.pre_tokenizers.Split("", "isolated")
    engine.decoder = tokenizers.decoders.Fuse()
    return engine


@pytest.fixture
def saved(tmp_path):
    def save(engine):
        engine.save(str(tmp_path / "tokenizer.json"))
        return make_tokenizer(f"file:{tmp_path}/tokenizer.json")

    return save


@given(st.text(st.characters(exclude_categories=["Cs"])))
def test_bytes_and_bpe_cover_every_text(bpe, text):
    for tokenizer in (ByteTokenizer(), bpe):
        tokens = tokenizer.encode(text)
        assert tokens.dtype == np.int32
        assert tokenizer.decode(tokens) == text
        assert tokenizer.byte_count(tokens) == len(text.encode())
        assert tokens.size == 0 or 0 <= tokens.min() <= tokens.max() < tokenizer.vocab


def test_bpe_has_the_size_asked_for_and_is_shorter_than_bytes(bpe):
    assert bpe.vocab == 280
    text = CORPUS.train[0]
    assert len(bpe.encode(text)) < 0.7 * len(text.encode())


def test_training_bpe_twice_gives_the_same(bpe):
    assert make_tokenizer("train:280", CORPUS) == bpe


def test_a_visible_separator_is_one_token_and_white_space_is_none(bpe):
    assert len(bpe.encode(SEPARATOR)) == 1
    spaces = make_tokenizer("train:280", corpus_of(*CORPUS.train, separator="\n\n"))
    assert json.loads(spaces.definition)["added_tokens"] == []


@pytest.mark.parametrize("name", ["bytes", "bpe"])
def test_json_round_trip(name, bpe):
    tokenizer = {"bytes": ByteTokenizer(), "bpe": bpe}[name]
    back = tokenizer_from_json(json.loads(json.dumps(tokenizer.to_json())))
    assert back == tokenizer
    np.testing.assert_array_equal(back.encode("thé cat"), tokenizer.encode("thé cat"))


def test_the_marks_of_texts_travel_as_json_and_are_no_text(bpe):
    data = bpe.to_json()
    assert "bos" not in data, "older readers need not know it"
    tokenizer = tokenizer_from_json({**data, "bos": 3, "eos": 0})
    assert (tokenizer.bos, tokenizer.eos) == (3, 0)
    assert tokenizer_from_json(json.loads(json.dumps(tokenizer.to_json()))) == tokenizer
    assert tokenizer != bpe
    text = tokenizer.encode("the cat")
    assert tokenizer.decode(np.concatenate([[3], text, [3], text])) == "the catthe cat"
    assert tokenizer.byte_count(np.array([3])) == 0


@pytest.mark.parametrize("wrong", [-1, 280, "3", True])
def test_a_mark_that_is_no_token_is_an_error(bpe, wrong):
    with pytest.raises(ValueError, match=r"bos=.* is no token of the vocabulary \[0, 280\)"):
        tokenizer_from_json({**bpe.to_json(), "bos": wrong})


@pytest.mark.parametrize("data", [{}, {"type": "words"}, {"type": "tokenizers"}])
def test_json_of_something_else_is_an_error(data):
    with pytest.raises(ValueError, match="not a tokenizer"):
        tokenizer_from_json(data)


def test_a_broken_character_decodes_to_the_replacement_character(bpe):
    for tokenizer in (ByteTokenizer(), make_tokenizer("train:257", CORPUS)):
        assert tokenizer.decode(tokenizer.encode("aé")[:-1]) == "a\ufffd"


@pytest.mark.parametrize("wrong", [-1, 280, 10**6])
def test_a_token_outside_the_vocabulary_is_an_error(bpe, wrong):
    for tokenizer in (ByteTokenizer(), bpe):
        with pytest.raises(ValueError, match=rf"token {wrong} is outside .* \[0, "):
            tokenizer.decode(np.array([65, wrong]))


def test_an_unknown_character_is_an_error_that_shows_it(saved):
    tokenizer = saved(word_level())
    assert tokenizer.decode(tokenizer.encode("ab ba")) == "ab ba"
    with pytest.raises(
        ValueError, match=r"does not cover .*'ab ca' comes back as 'ab \[UNK\]a'.*3"
    ):
        tokenizer.encode("ab ca")
    with pytest.raises(ValueError, match=r"test, split 'train': .*'a<b ' comes back"):
        tokenize(corpus_of("ab", "a<b", separator=" "), saved(word_level()))


def test_a_character_dropped_without_a_word_is_an_error(saved):
    engine = tokenizers.Tokenizer(tokenizers.models.BPE({"a": 0, "b": 1}, []))
    engine.decoder = tokenizers.decoders.Fuse()
    with pytest.raises(ValueError, match=r"'acb' comes back as 'ab'"):
        saved(engine).encode("acb")


def test_normalization_that_changes_text_is_an_error(saved):
    engine = word_level()
    engine.normalizer = tokenizers.normalizers.Lowercase()
    with pytest.raises(ValueError, match=r"'aB' comes back as 'ab'"):
        saved(engine).encode("aB")


def test_a_file_neither_cuts_nor_pads_nor_marks_the_text(saved):
    engine = word_level()
    engine.add_special_tokens(["[BOS]"])
    engine.post_processor = tokenizers.processors.TemplateProcessing(
        single="[BOS] $A", special_tokens=[("[BOS]", engine.token_to_id("[BOS]"))]
    )
    engine.enable_truncation(2)
    engine.enable_padding(length=8)
    np.testing.assert_array_equal(saved(engine).encode("abba"), [1, 2, 2, 1])


def test_the_vocabulary_reaches_the_largest_number_not_the_count(saved):
    model = tokenizers.models.WordLevel({"a": 0, "b": 7}, unk_token="a")
    assert saved(tokenizers.Tokenizer(model)).vocab == 8


def test_gpt2_files_encode_as_published(assets, saved):
    folder = assets / "gpt2_bpe"
    engine = tokenizers.Tokenizer(
        tokenizers.models.BPE.from_file(str(folder / "gpt2_vocab.json"), str(folder / "merges.txt"))
    )
    engine.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    engine.decoder = tokenizers.decoders.ByteLevel()
    tokenizer = saved(engine)
    # The numbers every GPT-2 implementation gives for this text.
    assert tokenizer.encode("Hello world").tolist() == [15496, 995]
    assert tokenizer.vocab == 50257


@pytest.mark.parametrize("spec", ["byte", "file:", "train:", "train:many", "train:-5", ""])
def test_an_unknown_tokenizer_lists_the_known_ones(spec):
    with pytest.raises(
        ValueError, match=r"unknown tokenizer .*'bytes', 'file:PATH'.*'train:VOCAB'"
    ):
        make_tokenizer(spec, CORPUS)


def test_wrong_files_are_named(tmp_path):
    with pytest.raises(FileNotFoundError, match="missing"):
        make_tokenizer(f"file:{tmp_path}/missing.json")
    (tmp_path / "other.json").write_text('{"model": 1}')
    with pytest.raises(ValueError, match=r"other\.json': not a tokenizer\.json"):
        make_tokenizer(f"file:{tmp_path}/other.json")


def test_vocabularies_that_cannot_be_trained_say_what_can():
    with pytest.raises(ValueError, match=r"at least 257 tokens \(256 bytes \+ 1 separator\)"):
        make_tokenizer("train:256", CORPUS)
    with pytest.raises(ValueError, match=r"yields only \d+ tokens. Use train:\d+"):
        make_tokenizer("train:5000", CORPUS)
    with pytest.raises(ValueError, match="none was given"):
        make_tokenizer("train:280")
