"""Text in, text out, as it comes."""

from collections.abc import Iterator
from typing import Protocol, runtime_checkable

import numpy as np
from jaxtyping import Array, Key

from lowbit_jax.generation.generate import LanguageModel, stream_tokens
from lowbit_jax.generation.quantized_cache import CacheFormat


@runtime_checkable
class TextCodec(Protocol):
    """What `stream_text` asks of a tokenizer."""

    def encode(self, text: str) -> np.ndarray:
        """Token ids int32 [length] of the text."""

    def decode(self, tokens: np.ndarray) -> str:
        """The text of token ids; bytes that are not (yet) a character are U+FFFD."""


def stream_text(
    model: LanguageModel,
    tokenizer: TextCodec,
    prompt: str,
    steps: int,
    *,
    key: Key[Array, ""] | None = None,
    temperature: float = 0.0,
    top_k: int | None = None,
    stop_token: int | None = None,
    cache_format: CacheFormat = "float",
) -> Iterator[str]:
    """Continues `prompt`, yielding pieces of text as soon as they are whole characters.

    As `generate` for one sequence: `steps` is in tokens; `stop_token` ends the text and is not part
    of it. To print as it comes: `for piece in stream_text(...): print(piece, end="", flush=True)`.

    Returns: An iterator of pieces; joined they are the text that follows the prompt.
    Raises: ValueError: at once, as `generate`; also for a prompt that has no tokens.
    """
    context = [int(token) for token in tokenizer.encode(prompt)]
    if not context:
        raise ValueError(
            f"stream_text: the prompt {prompt!r} has no tokens, and a model continues at least "
            f"one. Give it a character to start from, such as a newline."
        )
    tokens = stream_tokens(
        model,
        np.asarray([context], np.int32),
        steps,
        key=key,
        temperature=temperature,
        top_k=top_k,
        stop_token=stop_token,
        cache_format=cache_format,
    )
    return _pieces(tokenizer, context, tokens, stop_token)


def _pieces(
    tokenizer: TextCodec, context: list[int], tokens: Iterator[np.ndarray], stop_token: int | None
) -> Iterator[str]:
    # The prompt is decoded along: some tokenizers drop the space in front of their first word.
    shown = len(tokenizer.decode(np.asarray(context, np.int32)))
    text = ""
    for token in tokens:
        if stop_token is not None and token[0] == stop_token:
            break
        context.append(int(token[0]))
        text = tokenizer.decode(np.asarray(context, np.int32))
        whole = len(text.rstrip("\ufffd"))
        if whole > shown:
            yield text[shown:whole]
            shown = whole
    if text[shown:]:
        yield text[shown:]
