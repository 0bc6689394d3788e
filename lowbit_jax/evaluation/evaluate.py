"""How well a model predicts text: nats per token, perplexity, and bits per byte.

Text is read in windows of a stated context length, which do not share targets: a token at the
begin of a window is predicted from little context, so figures compare only at equal length. Nats
per token and perplexity compare only with the same tokenizer; bits per byte, nll / ln 2 * tokens /
bytes, compare across tokenizers.

Each window's sum comes from the device in float32 and is added up on the host exactly
(`math.fsum`): the result does not depend on the batch beyond the rounding inside a window.
"""

import dataclasses
import functools
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.experimental import multihost_utils
from jaxtyping import Integer

from lowbit_jax.data.batches import check_tokens, valid_windows
from lowbit_jax.evaluation.losses import token_nll

_EXP_MAX = 709.0  # exp of more is not a float64


@dataclasses.dataclass(frozen=True)
class Evaluation:
    """How well a text was predicted.

    nll: Mean negative log-likelihood, in nats per token.
    bits_per_byte: nll in bits per UTF-8 byte of the predicted text; None where the bytes are not
        known.
    ppl: exp(nll).
    tokens: Tokens predicted.
    length: Context length, in tokens.
    """

    nll: float
    bits_per_byte: float | None
    ppl: float
    tokens: int
    length: int


def evaluate(
    model: Any,
    tokens: Integer[np.ndarray, " n"],
    *,
    length: int,
    batch: int,
    byte_count: int | Callable[[Integer[np.ndarray, " m"]], int] | None = None,
    max_windows: int | None = None,
    apply: Callable[..., jax.Array] | None = None,
    sharding: jax.sharding.Sharding | None = None,
    on_batch: Callable[[int, int], None] | None = None,
) -> Evaluation:
    """Predicts each token but the first exactly once, in windows of `length`, and says how well.

    Compiled once per model structure, shape and `apply`, also over repeated calls. The model is
    called as it is: one with dropout or batch statistics must be in its evaluation mode.

    Args:
        model: An nnx.Module called as `model(tokens)`, a function `tokens -> logits`, or with
            `apply` any pytree. tokens are int32 [batch, length]; logits are float [batch, length,
            vocab].
        tokens: The text, one flat integer array; see `data.tokenize`.
        length: Context length, in tokens.
        batch: Windows at once; changes speed, not the result.
        byte_count: A function from tokens to the UTF-8 bytes of their text, such as
            `tokenizer.byte_count`, which is asked for exactly what was predicted; or the bytes of
            the whole text, from which the average per token is taken.
        max_windows: Evaluate only the first so many windows.
        apply: `apply(model, tokens) -> logits`, instead of calling the model. Pass the same
            function every time: a new one is compiled anew.
        sharding: How a batch lies on the devices; its first axis is that of the windows.
        on_batch: Called with (windows done, windows in all) after each batch.
    Raises:
        ValueError: Fewer than two tokens, a size below one, a token outside the model's vocabulary,
            logits of another shape, or something that cannot be called.
        FloatingPointError: A window's likelihood is NaN or zero; the message names the window.
    """
    check_tokens(tokens)
    whole_text = tokens
    if max_windows is not None:
        if max_windows < 1:
            raise ValueError(f"max_windows is {max_windows}; at least 1 is needed.")
        tokens = tokens[: max_windows * length + 1]
    batches = valid_windows(tokens, length, batch)  # checks the sizes
    call, state = _pure(model, apply)
    predicted = len(tokens) - 1
    windows = -(-predicted // length)
    sums: list[float] = []
    for inputs, mask in batches:
        if sharding is not None:
            inputs, mask = jax.device_put((inputs, mask), sharding)
        batch_sums, vocab = _window_nll(state, inputs, mask, call=call)
        if not sums:
            _check_vocabulary(tokens, int(vocab))
        # Behind the last window come rows that only fill the batch.
        new = _to_host(batch_sums)[: windows - len(sums)]
        _check_finite(new, len(sums), length)
        sums += new.tolist()
        if on_batch is not None:
            on_batch(len(sums), windows)

    nll = math.fsum(sums) / predicted
    bytes_per_token = None
    if callable(byte_count):
        bytes_per_token = byte_count(tokens[1:]) / predicted
    elif byte_count is not None:
        bytes_per_token = byte_count / len(whole_text)
    return Evaluation(
        nll=nll,
        bits_per_byte=bits_per_byte(nll, bytes_per_token) if bytes_per_token else None,
        ppl=math.exp(nll) if nll < _EXP_MAX else math.inf,
        tokens=predicted,
        length=length,
    )


def bits_per_byte(nll: float, bytes_per_token: float) -> float:
    """Nats per token as bits per byte: nll / ln 2 / (bytes per token)."""
    return nll / math.log(2) / bytes_per_token


@dataclasses.dataclass(frozen=True)
class _Call:
    """How a state becomes logits: the static half of a model.

    Hashable, and equal for equal structures: a compiled program is found again.

    graph: The structure of an nnx.Module whose state is passed, or None.
    apply: `apply(model, tokens)`, or None to call the model.
    function: A bare `tokens -> logits` in place of both, or None.
    """

    graph: Any = None
    apply: Callable[..., jax.Array] | None = None
    function: Callable[..., jax.Array] | None = None

    def __call__(self, state, tokens):
        if self.function is not None:
            return self.function(tokens)
        model = state if self.graph is None else nnx.merge(self.graph, state)
        return model(tokens) if self.apply is None else self.apply(model, tokens)


def _pure(model: Any, apply: Callable[..., jax.Array] | None) -> tuple[_Call, Any]:
    """Takes a model apart into what is static and a pytree of arrays."""
    if isinstance(model, nnx.Module):
        graph, state = nnx.split(model)
        return _Call(graph=graph, apply=apply), state
    if apply is not None:
        return _Call(apply=apply), model
    if callable(model):
        return _Call(function=model), None
    raise ValueError(
        f"a {type(model).__name__} cannot be called: pass an nnx.Module, a function tokens -> "
        "logits, or any pytree with `apply`."
    )


@functools.partial(jax.jit, static_argnames="call")
def _window_nll(state, windows, mask, *, call: _Call):
    """(negative log-likelihood of each window [batch], size of the vocabulary)."""
    inputs, targets = windows[:, :-1], windows[:, 1:]
    logits = call(state, inputs)
    if logits.ndim != 3 or logits.shape[:2] != inputs.shape:
        raise ValueError(
            f"the model made logits {list(logits.shape)} from tokens {list(inputs.shape)}; [batch, "
            "length, vocab] is needed."
        )
    nll = jnp.where(mask, token_nll(logits, targets), 0)
    return jnp.sum(nll, axis=1), jnp.int32(logits.shape[-1])


def _to_host(values: jax.Array) -> np.ndarray:
    if not values.is_fully_addressable:  # on a pod each host holds only its own windows' sums
        values = multihost_utils.process_allgather(values, tiled=True)
    return np.asarray(values, np.float64)


def _check_vocabulary(tokens: np.ndarray, vocab: int) -> None:
    # JAX clamps or fills what is out of range, without a word.
    if tokens.min() < 0 or tokens.max() >= vocab:
        wrong = tokens.min() if tokens.min() < 0 else tokens.max()
        raise ValueError(
            f"token {wrong} is outside the model's vocabulary [0, {vocab}): the text was tokenized "
            "for another model."
        )


def _check_finite(sums: np.ndarray, first: int, length: int) -> None:
    wrong = np.flatnonzero(~np.isfinite(sums))
    if wrong.size:
        window = first + int(wrong[0])
        raise FloatingPointError(
            f"the negative log-likelihood of window {window} (tokens {window * length} to "
            f"{(window + 1) * length}) is {sums[wrong[0]]}: the model's logits are not finite "
            "there. The weights or an overflow in a narrow type are the usual cause."
        )
