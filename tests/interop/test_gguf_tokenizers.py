"""Tokenizers of GGUF files make the tokens that their own rules make."""

import json

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from lowbit_jax.data import tokenizer_from_json
from lowbit_jax.interop import load_model
from lowbit_jax.interop.gguf import GGUFFile
from lowbit_jax.interop.gguf_tokenizers import tokenizer_of

SPACE = "▁"


def greedy(text: str, tokens: list[str], scores: np.ndarray, types: np.ndarray) -> list[int]:
    """SentencePiece's BPE: merge the best neighbours until none are left, then bytes."""
    numbers = {token: i for i, token in enumerate(tokens)}
    mergeable = {token: float(scores[i]) for token, i in numbers.items() if types[i] == 1}
    pieces = list((" " + text).replace(" ", SPACE)) if text else []
    while True:
        best = None
        for i in range(len(pieces) - 1):
            score = mergeable.get(pieces[i] + pieces[i + 1])
            if score is not None and (best is None or score > best[0]):
                best = (score, i)
        if best is None:
            break
        i = best[1]
        pieces[i : i + 2] = [pieces[i] + pieces[i + 1]]
    out = []
    for piece in pieces:
        known = piece in mergeable
        out += [numbers[piece]] if known else [numbers[f"<0x{b:02X}>"] for b in piece.encode()]
    return out


@pytest.fixture(scope="module")
def metadata(assets):
    return GGUFFile(assets / "stories260k" / "stories260K.gguf").metadata


@pytest.fixture(scope="module")
def stories(metadata):
    return tokenizer_of(metadata, "stories260K")


@pytest.fixture(scope="module")
def plain(metadata):
    parts = [metadata[f"tokenizer.ggml.{name}"] for name in ("tokens", "scores", "token_type")]
    return lambda text: greedy(text, *parts)


def test_merging_by_rank_is_merging_by_score(stories, plain, assets):
    text = (assets / "tinystories" / "valid.txt").read_text()
    for story in text.split("<|endoftext|>")[:12]:
        for part in story.strip().split("\n"):
            tokens = stories.encode(part)
            assert tokens.tolist() == plain(part)
            assert stories.decode(tokens) == part


@given(
    text=st.text(st.characters(exclude_categories=["Cs"], exclude_characters=SPACE), max_size=20)
)
def test_every_text_comes_back_from_the_same_tokens(stories, plain, text):
    tokens = stories.encode(text)
    assert tokens.tolist() == plain(text)
    assert stories.decode(tokens) == text


@given(text=st.text(st.sampled_from("aeht n<s>/\n"), max_size=30))
def test_text_that_looks_like_a_mark_is_text(stories, plain, text):
    tokens = stories.encode(f"<s>{text}</s>")
    assert tokens.tolist() == plain(f"<s>{text}</s>")
    assert not {stories.bos, stories.eos} & set(tokens.tolist())


def test_marks_are_known_and_the_begin_is_no_text(stories):
    assert (stories.bos, stories.eos, stories.vocab) == (1, 2, 512)
    one, two = stories.encode("A cat."), stories.encode(" A dog.")
    tokens = np.concatenate([[1], one, [1], two])
    assert stories.decode(tokens) == "A cat. A dog."
    assert stories.byte_count(tokens) == len("A cat. A dog.")


def test_json_round_trip(stories):
    back = tokenizer_from_json(json.loads(json.dumps(stories.to_json())))
    assert back == stories
    assert (back.bos, back.eos) == (1, 2)
    np.testing.assert_array_equal(back.encode("A cat"), stories.encode("A cat"))


def byte_level(assets, **more):
    folder = assets / "gpt2_bpe"
    vocab = json.loads((folder / "gpt2_vocab.json").read_text())
    merges = (folder / "merges.txt").read_text().splitlines()[1:]
    return {
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.tokens": sorted(vocab, key=vocab.__getitem__),
        "tokenizer.ggml.merges": [merge for merge in merges if merge],
        "tokenizer.ggml.eos_token_id": 50256,
        **{f"tokenizer.ggml.{key}": value for key, value in more.items()},
    }


def test_gpt2_encodes_as_published(assets):
    tokenizer = tokenizer_of(byte_level(assets, pre="gpt-2"), "gpt2")
    # The numbers every GPT-2 implementation gives for this text.
    assert tokenizer.encode("Hello world").tolist() == [15496, 995]
    assert (tokenizer.bos, tokenizer.eos, tokenizer.vocab) == (None, 50256, 50257)
    assert 50256 not in tokenizer.encode("<|endoftext|>")


@pytest.mark.parametrize(
    ("pre", "text", "cuts"),
    [
        # Each rule's own treatment of numbers; the pieces never cross a cut.
        ("gpt-2", "a 12345", ["a", " 12345"]),
        ("smollm", "a 12", ["a", " ", "1", "2"]),
        ("llama-bpe", "a 12345", ["a", " ", "123", "45"]),
        ("qwen2", "a 12", ["a", " ", "1", "2"]),
        ("llama-bpe", "It'S\n\n ok!", ["It", "'S", "\n\n", " ok", "!"]),
    ],
)
def test_text_is_cut_by_the_rule_that_the_file_names(assets, pre, text, cuts):
    tokenizer = tokenizer_of(byte_level(assets, pre=pre), "file")
    pieces = tokenizer._engine.pre_tokenizer.pre_tokenize_str(text)
    assert [text[slice(*span)] for _, span in pieces] == cuts
    assert tokenizer.decode(tokenizer.encode(text)) == text


def test_user_defined_tokens_are_found_in_text(metadata):
    types = metadata["tokenizer.ggml.token_type"].copy()
    tokens = [*metadata["tokenizer.ggml.tokens"][:-1], "\t\t"]
    types[-1] = 4
    changed = metadata | {
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.token_type": types,
        "tokenizer.ggml.add_space_prefix": False,
    }
    tokenizer = tokenizer_of(changed, "file")
    got = tokenizer.encode("a\t\tb")
    assert 511 in got
    assert tokenizer.decode(got) == "a\t\tb"


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"model": "rwkv"}, NotImplementedError, r"'rwkv' are not supported. Kinds: \['gpt2'"),
        ({"tokens": ["a", "a"]}, ValueError, r"tokens has 2 entries, 1 different"),
        ({"tokens": None}, ValueError, r"tokens is not an array of strings"),
        ({"scores": None}, ValueError, r"scores is missing"),
        ({"scores": np.zeros(3, np.float32)}, ValueError, r"scores has 3 entries for 512 tokens"),
        ({"scores": np.full(512, np.nan, np.float32)}, ValueError, r"not finite"),
        ({"token_type": [1]}, ValueError, r"token_type is not an array of numbers"),
        ({"bos_token_id": 512}, ValueError, r"bos_token_id is 512, outside \[0, 512\)"),
    ],
)
def test_parts_that_do_not_fit_are_named(metadata, changes, error, message):
    changes = {f"tokenizer.ggml.{key}": value for key, value in changes.items()}
    with pytest.raises(error, match=message):
        tokenizer_of(metadata | changes, "file")


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"pre": "other"}, NotImplementedError, r"pre is 'other'.*'llama-bpe'"),
        ({"merges": ["a b c"]}, ValueError, r"merges has 'a b c'"),
        ({"merges": ["a nothing"]}, ValueError, r"not consistent"),
    ],
)
def test_byte_level_parts_that_do_not_fit_are_named(changes, error, message):
    small = {
        "model": "gpt2",
        "tokens": ["a", "b", "ab"],
        "merges": ["a b"],
        **changes,
    }
    with pytest.raises(error, match=message):
        tokenizer_of({f"tokenizer.ggml.{k}": v for k, v in small.items()}, "file")


def test_a_file_without_a_tokenizer_has_none(assets):
    assert tokenizer_of({}, "file") is None
    assert load_model(assets / "resnet_cifar10" / "resnet20-12fca82f.th").tokenizer is None
