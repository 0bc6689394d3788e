"""A corpus as one flat array of tokens."""

from collections.abc import Iterable, Iterator

import numpy as np
from jaxtyping import Integer

from lowbit_jax.data.corpus import Corpus, Split
from lowbit_jax.data.tokenizers import Tokenizer

# Characters encoded at once: enough work for all cores, and little beside a large corpus.
_CHUNK = 1 << 24


def tokenize(
    corpus: Corpus, tokenizer: Tokenizer, split: Split = "train"
) -> Integer[np.ndarray, " n"]:
    """The tokens of a split: every document, each followed by the separator.

    Always: decoded, they are the split's text. The type is the smallest of uint8, uint16 and int32
    that holds the vocabulary. Documents are encoded on their own: no token reaches across two of
    them.

    Raises: ValueError: The vocabulary does not cover the text, or a token lies outside it.
    """
    dtype = token_dtype(tokenizer.vocab)
    parts = []
    for texts in _chunks(corpus.texts(split)):
        try:
            tokens = tokenizer.encode_batch(texts)
        except ValueError as error:
            raise ValueError(f"{corpus.name}, split {split!r}: {error}") from error
        if tokens.size and not 0 <= tokens.min() <= tokens.max() < tokenizer.vocab:
            raise ValueError(
                f"{corpus.name}, split {split!r}: the tokenizer made tokens from {tokens.min()} to "
                f"{tokens.max()}, but its vocabulary is [0, {tokenizer.vocab})."
            )
        parts.append(tokens.astype(dtype, copy=False))
    return np.concatenate(parts)


def token_dtype(vocab: int) -> np.dtype:
    """The smallest of uint8, uint16 and int32 that holds [0, vocab)."""
    for dtype in (np.uint8, np.uint16):
        if vocab <= np.iinfo(dtype).max + 1:
            return np.dtype(dtype)
    return np.dtype(np.int32)


def _chunks(texts: Iterable[str]) -> Iterator[list[str]]:
    """Consecutive texts of about `_CHUNK` characters together."""
    chunk: list[str] = []
    size = 0
    for text in texts:
        chunk.append(text)
        size += len(text)
        if size >= _CHUNK:
            yield chunk
            chunk, size = [], 0
    if chunk:
        yield chunk
