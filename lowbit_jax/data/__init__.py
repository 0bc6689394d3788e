"""Text in, token batches out.

A source's documents are split the same way on every machine, tokenized without loss, and read in
batches that are a function of the step alone:

    corpus = load_corpus("stdlib")
    tokenizer = make_tokenizer("bytes", corpus)
    batches = TokenBatches(tokenize(corpus, tokenizer), batch=8, length=128, seed=0)
    batches[step]  # int32 [8, 129]
"""

from lowbit_jax.data.batches import TokenBatches, valid_windows
from lowbit_jax.data.corpus import Corpus, Split
from lowbit_jax.data.sources import load_corpus
from lowbit_jax.data.tokenizers import (
    ByteTokenizer,
    SubwordTokenizer,
    Tokenizer,
    make_tokenizer,
    tokenizer_from_json,
)
from lowbit_jax.data.tokens import tokenize

__all__ = [
    "ByteTokenizer",
    "Corpus",
    "Split",
    "SubwordTokenizer",
    "TokenBatches",
    "Tokenizer",
    "load_corpus",
    "make_tokenizer",
    "tokenize",
    "tokenizer_from_json",
    "valid_windows",
]
