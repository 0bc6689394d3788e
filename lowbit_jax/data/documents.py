"""Text as documents, for models that read each document from its begin.

A model whose tokenizer has a token for the begin of a text saw every document behind that token;
calibration and evaluation show it text in the same way.
"""

import glob
import itertools
import os
import pathlib
from collections.abc import Sequence

import numpy as np
from jaxtyping import Bool, Int32

from lowbit_jax.data.corpus import Split
from lowbit_jax.data.sources import load_corpus
from lowbit_jax.data.tokenizers import Tokenizer


def read_files(pattern: str) -> list[str]:
    """The text of all files that match `pattern`, sorted by path.

    Raises:
        FileNotFoundError: No file matches.
        ValueError: A file is not UTF-8.
    """
    found = glob.glob(os.path.expanduser(pattern), recursive=True)
    paths = sorted(pathlib.Path(p) for p in found if os.path.isfile(p))
    if not paths:
        raise FileNotFoundError(
            f"text:{pattern}: matches no file (seen from {os.getcwd()}). Quote a pattern, so that "
            "the shell leaves it."
        )
    texts = []
    for path in paths:
        try:
            texts.append(path.read_bytes().decode())
        except UnicodeDecodeError as error:
            raise ValueError(f"{path}: is not UTF-8 text ({error}).") from error
    return texts


def load_documents(source: str, separator: str, split: Split) -> Sequence[str]:
    """The documents of a source.

    Args:
        source: "text:GLOB": whole files, cut where the separator occurs, white space around each
            document stripped and empty ones dropped. "stdlib" or "hf:...": one split of the corpus.
        separator: Between documents; "": every file is one document, as it is.
        split: Of a corpus; "text:GLOB" is one text, and the caller says which.

    Raises: ValueError, OSError: No such text; see `load_corpus`.
    """
    if not source.startswith("text:"):
        return load_corpus(source, separator=separator or "\n\n").documents(split)
    texts = read_files(source.removeprefix("text:"))
    if not separator:
        return texts
    parts = itertools.chain.from_iterable(text.split(separator) for text in texts)
    return [part.strip() for part in parts if part.strip()]


def stream(
    documents: Sequence[str], tokenizer: Tokenizer, separator: str, at_most: int | None = None
) -> Int32[np.ndarray, " n"]:
    """Documents as one row of tokens: each behind the begin token, or else before the separator.

    Args:
        documents: Texts.
        tokenizer: Its `bos` stands in front of every document.
        separator: Stands behind every document if there is no `bos`.
        at_most: Tokens that are enough; documents behind them are not read.
    """
    parts: list[np.ndarray] = []
    count = 0
    for document in documents:
        if at_most is not None and count >= at_most:
            break
        parts.append(document_tokens(document, tokenizer, separator))
        count += len(parts[-1])
    tokens = np.concatenate([*parts, np.empty(0, np.int32)])
    return tokens[:at_most].astype(np.int32)


def document_tokens(document: str, tokenizer: Tokenizer, separator: str) -> np.ndarray:
    """One document, behind the begin token, or else before the separator."""
    if tokenizer.bos is None:
        return tokenizer.encode(document + separator)
    return np.concatenate([np.array([tokenizer.bos], np.int32), tokenizer.encode(document)])


def document_windows(
    documents: Sequence[str], tokenizer: Tokenizer, length: int
) -> tuple[Int32[np.ndarray, "documents {length}"], Bool[np.ndarray, "documents {length}-1"]]:
    """Each document on a row of its own, cut to `length` tokens, and which targets count.

    Targets are the tokens behind the first; rows end in token 0, which is masked. Documents of a
    single token predict nothing and are left out.
    """
    rows = [document_tokens(document, tokenizer, "")[:length] for document in documents]
    rows = [row for row in rows if len(row) > 1]
    tokens = np.zeros((len(rows), length), np.int32)
    mask = np.zeros((len(rows), length - 1), bool)
    for i, row in enumerate(rows):
        tokens[i, : len(row)] = row
        mask[i, : len(row) - 1] = True
    return tokens, mask
