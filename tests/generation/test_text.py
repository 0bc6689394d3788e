"""Streamed text is the text, in pieces that are whole characters."""

import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from lowbit_jax.generation import stream_text

STOP, STEPS = 0, 9  # the same steps for all, so that they share their programs


class Bytes:
    """One token a byte."""

    def encode(self, text):
        return np.frombuffer(text.encode(), np.uint8).astype(np.int32)

    def decode(self, tokens):
        return bytes(int(token) for token in tokens).decode(errors="replace")


class Reciter(nnx.Module):
    """A language model that says one text, whatever it is asked; its cache is where it is."""

    def __init__(self, text: bytes, prompt: int):
        self.config = types.SimpleNamespace(vocab=256, max_length=64)
        self.text = nnx.Variable(jnp.asarray([*text, *[STOP] * (STEPS - len(text))]))
        self.prompt = prompt

    def init_cache(self, batch, capacity):
        return Place()

    def features(self, tokens, cache):
        at = cache.length[...] + jnp.arange(tokens.shape[1]) - (self.prompt - 1)
        cache.length[...] += tokens.shape[1]
        said = jnp.take(self.text[...], at, mode="clip")
        return jnp.broadcast_to(said[None, :, None], (*tokens.shape, 1))

    def logits(self, features):
        return jax.nn.one_hot(features[..., 0], 256)


class Place(nnx.Module):
    def __init__(self):
        self.length = nnx.Cache(jnp.zeros((), jnp.int32))


def pieces(text: bytes, prompt: str = "a", stop_token: int = STOP) -> list[str]:
    model = Reciter(text, len(prompt.encode()))
    return list(stream_text(model, Bytes(), prompt, STEPS, stop_token=stop_token))


def test_pieces_come_token_by_token_and_characters_come_whole():
    assert pieces("né → x".encode()) == ["n", "é", " ", "→", " ", "x"]


def test_a_character_that_stays_broken_is_shown_as_such():
    assert pieces(b"n\xc3x") == ["n", "\ufffdx"]
    assert pieces("n→".encode()[:-1]) == ["n", "\ufffd"]


def test_the_stop_token_ends_the_text_and_is_not_in_it():
    assert "".join(pieces(b"one\ntwo", stop_token=ord("\n"))) == "one"


def test_without_a_stop_token_the_text_is_as_long_as_asked():
    model = Reciter(b"abc", 1)
    assert "".join(stream_text(model, Bytes(), "a", STEPS)) == "abc" + "\0" * (STEPS - 3)


def test_the_prompt_is_not_repeated():
    assert "".join(pieces(b"tail", prompt="→ ")) == "tail"


def test_a_prompt_without_tokens_is_refused_at_once():
    with pytest.raises(ValueError, match=r"the prompt '' has no tokens"):
        stream_text(Reciter(b"x", 0), Bytes(), "", 1)


def test_a_text_beyond_the_models_context_is_refused_at_once():
    with pytest.raises(ValueError, match=r"1 prompt tokens \+ 64 new ones = 65 tokens"):
        stream_text(Reciter(b"x", 1), Bytes(), "a", 64)
