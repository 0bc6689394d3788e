"""LLM-QAT's data: text that the float model writes itself (arXiv:2305.17888, section 3.1).

A quantized student needs the distribution that its teacher knows, not new facts; the paper takes it
from the teacher, so that no training text is needed. Every document begins with a token drawn
uniformly from the vocabulary; the next ones (the paper: 3 to 5) are the most likely ones, which
makes the beginning plausible; all others are drawn from the model's distribution, which makes the
documents different from one another.

The rest of the method is here already: train on the text with `distill.teacher`, whose loss on soft
labels (section 3.2) may stand alone (`distill.weight=1`), and quantized weights and activations by
a recipe (`w4a8_kv4` for the layers that make keys and values). `ptq.Written` gives the tokens to a
stage of post-training quantization.
"""

from collections.abc import Iterator
from typing import TYPE_CHECKING

import jax
import numpy as np
from jaxtyping import Array, Int32, Key

from lowbit_jax.generation.generate import LanguageModel, generate

if TYPE_CHECKING:  # at run time PTQ takes tokens from here, and no data
    from lowbit_jax.data import Tokenizer


def generated_tokens(
    model: LanguageModel,
    documents: int,
    length: int,
    *,
    key: Key[Array, ""],
    greedy: int = 4,
    batch: int = 32,
    vocab: int | None = None,
    first: int | None = None,
) -> Iterator[Int32[np.ndarray, "n {length}"]]:
    """Documents that a model writes, up to `batch` at a time.

    Args:
        model: Float, as the teacher.
        documents: How many.
        length: Of each, in tokens, the first one included; at most the model's `max_length`.
        key: Document i depends on it and on `batch` alone, not on how many follow.
        greedy: Tokens behind the first that are the most likely ones; 0: all are drawn.
        batch: Documents that are written at once; the last batch is written whole, and cut.
        vocab: First tokens are drawn from [0, vocab); default: the model's.
        first: The first token of every document, such as one that begins a text, instead.

    Raises:
        ValueError: At once: a count that is not positive, or a length that does not leave room for
            a drawn token or exceeds the model's context.
    """
    if documents < 1 or batch < 1 or greedy < 0:
        raise ValueError(
            f"generated_tokens: documents={documents}, batch={batch}, greedy={greedy}: the first "
            "two are at least 1, the last 0."
        )
    if first is not None and not 0 <= first < model.config.vocab:
        raise ValueError(
            f"generated_tokens: first={first} is no token of the model's {model.config.vocab}."
        )
    most = model.config.max_length
    if not greedy + 2 <= length <= most:
        raise ValueError(
            f"generated_tokens: length={length} is not in [{greedy + 2}, {most}]: a first token, "
            f"{greedy} greedy ones and at least one that is drawn, within the model's max_length."
        )

    def run() -> Iterator[np.ndarray]:
        for start in range(0, documents, batch):
            first_key, rest_key = jax.random.split(jax.random.fold_in(key, start))
            if first is None:
                drawn = jax.random.randint(first_key, (batch, 1), 0, vocab or model.config.vocab)
                prompt = np.asarray(drawn)
            else:
                prompt = np.full((batch, 1), first, np.int32)
            if greedy:
                prompt = np.concatenate([prompt, generate(model, prompt, greedy)], axis=1)
            steps = length - 1 - greedy
            rest = generate(model, prompt, steps, key=rest_key, temperature=1.0)
            yield np.concatenate([prompt, rest], axis=1)[: documents - start]

    return run()


def generated_documents(
    model: LanguageModel,
    tokenizer: "Tokenizer",
    documents: int,
    length: int,
    *,
    key: Key[Array, ""],
    greedy: int = 4,
    batch: int = 32,
) -> Iterator[str]:
    """As `generated_tokens`, decoded.

    Bytes that are no UTF-8 become U+FFFD, and a tokenizer may cut the text differently when it
    reads it: what is trained on is the text, not the tokens that were drawn. Tokens that the
    tokenizer does not have (of a vocabulary that was filled up to a round number) are left out.
    """
    known = min(tokenizer.vocab, model.config.vocab)
    batches = generated_tokens(
        model, documents, length, key=key, greedy=greedy, batch=batch, vocab=known
    )
    return (tokenizer.decode(row[row < known]) for tokens in batches for row in tokens)
