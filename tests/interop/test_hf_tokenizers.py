"""The tokenizer of a folder knows its marks as its own files say."""

import json

import numpy as np
import pytest
import tokenizers

from lowbit_jax.interop.hf_tokenizers import load_tokenizer


@pytest.fixture
def write(tmp_path):
    def write(*, marked: bool, config=None, options=None):
        engine = tokenizers.Tokenizer(
            tokenizers.models.BPE({"a": 0, "b": 1, "ab": 2, "<s>": 3, "</s>": 4}, [("a", "b")])
        )
        engine.decoder = tokenizers.decoders.Fuse()
        engine.add_special_tokens(["<s>", "</s>"])
        if marked:
            engine.post_processor = tokenizers.processors.TemplateProcessing(
                single="<s> $A", special_tokens=[("<s>", 3)]
            )
        engine.save(str(tmp_path / "tokenizer.json"))
        (tmp_path / "config.json").write_text(json.dumps(config or {}))
        if options is not None:
            (tmp_path / "tokenizer_config.json").write_text(json.dumps(options))
        return load_tokenizer(tmp_path)

    return write


@pytest.mark.parametrize(
    ("options", "config"),
    [
        ({"bos_token": "<s>", "eos_token": "</s>"}, {}),
        ({"bos_token": {"content": "<s>"}, "eos_token": {"content": "</s>"}}, {}),
        (None, {"bos_token_id": 3, "eos_token_id": [4, 0]}),
    ],
)
def test_marks_are_found_where_they_are_written(write, options, config):
    tokenizer = write(marked=True, options=options, config=config)
    assert (tokenizer.bos, tokenizer.eos) == (3, 4)
    np.testing.assert_array_equal(tokenizer.encode("abb"), [2, 1])
    assert tokenizer.decode(np.array([3, 2, 1])) == "abb"


def test_a_begin_that_the_tokenizer_does_not_put_is_none(write):
    """As in Qwen's and SmolLM's folders, which name one."""
    assert write(marked=False, options={"bos_token": "<s>"}).bos is None
    assert write(marked=False, options={"bos_token": "<s>", "add_bos_token": True}).bos == 3
    assert write(marked=True, options={"bos_token": "<s>", "add_bos_token": False}).bos is None


def test_numbers_outside_the_vocabulary_are_no_marks(write):
    tokenizer = write(marked=True, config={"bos_token_id": 99, "eos_token_id": "x"})
    assert (tokenizer.bos, tokenizer.eos) == (None, None)


def test_text_that_spells_the_begin_is_an_error_that_shows_it(write):
    """Decoding would leave it out."""
    tokenizer = write(marked=True, options={"bos_token": "<s>"})
    with pytest.raises(ValueError, match=r"'a<s>b' comes back as 'ab' .*character 1"):
        tokenizer.encode("a<s>b")


def test_a_folder_without_the_file_has_none(tmp_path):
    assert load_tokenizer(tmp_path) is None


def test_a_damaged_file_is_named(tmp_path):
    for content in (b"{", b"\xff"):
        (tmp_path / "tokenizer.json").write_bytes(content)
        with pytest.raises(ValueError, match=r"tokenizer.json"):
            load_tokenizer(tmp_path)
