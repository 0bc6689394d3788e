"""Several models on the same text: the loss of each, and how far each is from the first.

KL(p || q) = sum_v p(v) (log p(v) - log q(v)) of the next token, averaged over all predicted tokens:
what quantization changed, whether or not the text liked it. It sees a change where gains and losses
of the likelihood cancel.
"""

import dataclasses
import functools
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Bool, Float, Integer

from lowbit_jax.evaluation.losses import token_nll

Batch = tuple[Integer[np.ndarray, "rows length"], Bool[np.ndarray, "rows length-1"]]
"""Tokens, and which of those behind the first are predicted."""


@dataclasses.dataclass(frozen=True)
class Divergence:
    """How one model predicts a text.

    nll: Mean negative log-likelihood, in nats per token.
    ppl: exp(nll).
    kl: Mean KL(first model || this one), in nats per token; 0 for the first.
    tokens: Tokens predicted.
    increase_se: Standard error of nll minus that of the first model, taken row by row: how far the
        increase would move on other text of the same kind. NaN with a single row.
    """

    nll: float
    ppl: float
    kl: float
    tokens: int
    increase_se: float


def divergences(
    models: Mapping[str, nnx.Module],
    batches: Sequence[Batch],
    on_batch: Callable[[int, int], None] | None = None,
) -> dict[str, Divergence]:
    """Evaluates models side by side.

    Args:
        models: Called as `model(tokens) -> logits [rows, length, vocab]`; the first is the one that
            the others are held against.
        batches: All of one shape, or each new shape is compiled anew.
        on_batch: Called with (batches done, batches in all).

    Returns: The same names.

    Raises:
        ValueError: Nothing is predicted, or a token is outside the vocabulary.
        FloatingPointError: A model's likelihood is not finite.
    """
    total = int(sum(mask.sum() for _, mask in batches))
    if not total:
        raise ValueError("evaluation: the text has no token to predict. Give a longer one.")
    parts = {name: nnx.split(model) for name, model in models.items()}
    nll: dict[str, list[float]] = {name: [] for name in models}
    kl: dict[str, list[float]] = {name: [] for name in models}
    for number, (tokens, mask) in enumerate(batches):
        reference = None
        for name, (graph, state) in parts.items():
            logits = _logits(graph, state, tokens[:, :-1])
            if reference is None:
                check_vocabulary(tokens, logits.shape[-1])
                reference = logits
            sums = _sums(reference, logits, tokens[:, 1:], mask)
            rows = [np.asarray(x, np.float64) for x in sums]
            if not all(np.isfinite(x).all() for x in rows):
                raise FloatingPointError(
                    f"{name}: its logits are not finite on evaluation batch {number}. Damaged "
                    "weights or a range that overflows are the usual cause."
                )
            nll[name] += rows[0].tolist()
            kl[name] += rows[1].tolist()
        if on_batch is not None:
            on_batch(number + 1, len(batches))
    # Rounding can leave a divergence of 0 a little below it.
    means = {
        name: (math.fsum(nll[name]) / total, max(0.0, math.fsum(kl[name]) / total))
        for name in models
    }
    first = next(iter(nll.values()))
    counts = [int(count) for _, mask in batches for count in mask.sum(axis=1)]
    return {
        name: Divergence(
            n, math.exp(min(n, 700.0)), k, total, increase_se(nll[name], first, counts)
        )
        for name, (n, k) in means.items()
    }


def increase_se(nll: Sequence[float], first: Sequence[float], counts: Sequence[int]) -> float:
    """Standard error of the mean increase of a loss over another model's, from paired rows.

    The mean is a ratio of sums, over rows of unequal length, so the error is that of a ratio
    (Cochran, Sampling Techniques, 3rd edition, chapter 6).

    Args:
        nll: Loss of each row, summed over its tokens.
        first: Of the other model, for the same rows.
        counts: Tokens of each row; rows without any are left out.
    """
    used = np.asarray(counts, np.float64) > 0
    tokens = np.asarray(counts, np.float64)[used]
    differences = (np.asarray(nll, np.float64) - np.asarray(first, np.float64))[used]
    if len(tokens) < 2:
        return math.nan
    residuals = differences - differences.sum() / tokens.sum() * tokens
    variance = (residuals**2).sum() * len(tokens) / (len(tokens) - 1)
    return float(np.sqrt(variance) / tokens.sum())


def batches_of(
    tokens: Integer[np.ndarray, "n length"], mask: Bool[np.ndarray, "n length-1"], rows: int
) -> list[Batch]:
    """Batches of at most `rows`, all of one shape; rows that only fill the last are masked."""
    rows = min(rows, max(len(tokens), 1))
    fill = -len(tokens) % rows
    tokens, mask = (np.pad(x, ((0, fill), (0, 0))) for x in (tokens, mask))
    return [(tokens[i : i + rows], mask[i : i + rows]) for i in range(0, len(tokens), rows)]


def check_vocabulary(tokens: np.ndarray, vocab: int, where: str = "evaluation") -> None:
    """Raises ValueError if a token is outside [0, vocab), which JAX would fill without a word."""
    if tokens.size and (tokens.min() < 0 or tokens.max() >= vocab):
        wrong = tokens.min() if tokens.min() < 0 else tokens.max()
        raise ValueError(
            f"{where}: token {wrong} is outside the model's vocabulary [0, {vocab}): the text was "
            "tokenized for another model."
        )


@functools.partial(jax.jit, static_argnums=0)
def _logits(graph: Any, state: Any, inputs: Array) -> Float[Array, "rows length vocab"]:
    return nnx.merge(graph, state)(inputs).astype(jnp.float32)


@jax.jit
def _sums(
    reference: Float[Array, "rows length vocab"],
    logits: Float[Array, "rows length vocab"],
    targets: Array,
    mask: Array,
) -> tuple[Float[Array, " rows"], Float[Array, " rows"]]:
    """Negative log-likelihood and KL of each row."""
    log_p = jax.nn.log_softmax(reference, axis=-1)
    log_q = jax.nn.log_softmax(logits, axis=-1)
    kl = jnp.sum(jnp.exp(log_p) * (log_p - log_q), axis=-1)
    nll = token_nll(logits, targets)
    return jnp.sum(jnp.where(mask, nll, 0), axis=1), jnp.sum(jnp.where(mask, kl, 0), axis=1)
