"""KV-cached generation in two programs: one reads the prompt, the other writes tokens.

Both take the model as an argument, so they are compiled once per structure and shapes (batch,
prompt length, prompt length + steps), whatever the weights. Where a caller wants to see each token
the second program writes one per call; else it writes all of them in one, and the host does nothing
in between.
"""

import functools
from collections.abc import Callable, Iterator
from typing import Any, Protocol, runtime_checkable

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float, Int32, Key

from lowbit_jax.generation.quantized_cache import CacheFormat, quantized_cache


@runtime_checkable
class LanguageModel(Protocol):
    """What generation asks of a model, an `nnx.Module`; `lowbit_jax.models.Decoder` is one."""

    config: Any
    """Has `vocab` and `max_length`, in tokens."""

    def init_cache(self, batch: int, capacity: int) -> nnx.Module:
        """An empty cache for `batch` sequences of up to `capacity` tokens."""

    def features(self, tokens: Array, cache: nnx.Module) -> Array:
        """Features [batch, length, dim] of `tokens`, which continue the cache and enter it."""

    def logits(self, features: Array) -> Array:
        """Float32 logits [..., vocab] of the token that follows."""


def generate(
    model: LanguageModel,
    prompt: Array | np.ndarray,
    steps: int,
    *,
    key: Key[Array, ""] | None = None,
    temperature: float = 0.0,
    top_k: int | None = None,
    stop_token: int | None = None,
    cache_format: CacheFormat = "float",
    on_token: Callable[[np.ndarray], None] | None = None,
) -> Int32[Array, "batch {steps}"]:
    """Continues each prompt by `steps` tokens.

    Args:
        model: A `LanguageModel`, float or quantized.
        prompt: Token ids [batch, length] in `[0, vocab)`; at least one per sequence.
        steps: Number of tokens to write, at least 1.
        key: Random key; needed where `temperature > 0`.
        temperature: Divides the logits before sampling; 0: the most likely token, ties to the
            lowest id.
        top_k: Sample among the `top_k` most likely tokens only, and those that tie with the last
            of them. No effect at temperature 0.
        stop_token: A sequence that has written it goes on with nothing else.
        cache_format: What keys and values are held in: "float" (as they are); "int8", "fp8" or
            "int4", per position and head; "kivi2" or "kivi4", KIVI's 2 or 4 bits with 128 recent
            positions in float.
        on_token: Called on the host with the tokens int32 [batch] of each step, as they come.
    Returns: The new tokens; `on_token` does not change them (but for ties within rounding).
    Raises: ValueError: an argument is out of its range, or `length + steps` is more than the
        model's `max_length`; see also `quantized_cache`.
    """
    chunk = steps if on_token is None and stop_token is None else 1
    written = []
    for tokens in _chunks(
        model,
        prompt,
        steps,
        chunk,
        key=key,
        temperature=temperature,
        top_k=top_k,
        stop=stop_token,
        cache_format=cache_format,
    ):
        written.append(tokens)
        if on_token is not None:
            on_token(np.asarray(tokens[:, 0]))
    tokens = jnp.concatenate(written, axis=1)
    # Where all sequences stopped early, the rest is the stop token by definition.
    rest = steps - tokens.shape[1]
    return jnp.pad(tokens, ((0, 0), (0, rest)), constant_values=stop_token if rest else 0)


def stream_tokens(
    model: LanguageModel,
    prompt: Array | np.ndarray,
    steps: int,
    *,
    key: Key[Array, ""] | None = None,
    temperature: float = 0.0,
    top_k: int | None = None,
    stop_token: int | None = None,
    cache_format: CacheFormat = "float",
) -> Iterator[np.ndarray]:
    """As `generate`, but yields the tokens int32 [batch] of each step, until all have stopped."""
    chunks = _chunks(
        model,
        prompt,
        steps,
        1,
        key=key,
        temperature=temperature,
        top_k=top_k,
        stop=stop_token,
        cache_format=cache_format,
    )
    return (np.asarray(tokens[:, 0]) for tokens in chunks)


def sample(
    logits: Float[Array, "batch vocab"],
    key: Key[Array, ""],
    temperature: Float[Array, ""],
    top_k: int | None = None,
) -> Int32[Array, " batch"]:
    """Draws a token per row from softmax(logits / temperature); `top_k` as of `generate`."""
    if top_k is not None:
        least = jax.lax.top_k(logits, top_k)[0][:, -1:]
        logits = jnp.where(logits < least, -jnp.inf, logits)
    return jax.random.categorical(key, logits / temperature).astype(jnp.int32)


def _chunks(
    model: LanguageModel,
    prompt: Array | np.ndarray,
    steps: int,
    chunk: int,
    *,
    key: Array | None,
    temperature: float,
    top_k: int | None,
    stop: int | None,
    cache_format: CacheFormat,
) -> Iterator[Array]:
    """Checks at once; then yields new tokens [batch, n], one first and up to `chunk` afterwards."""
    prompt = np.asarray(prompt)
    _check(model.config, prompt, steps, key, temperature, top_k)
    # Without a key the programs are greedy, whatever the temperature.
    key = None if temperature == 0 else key
    heat = np.float32(temperature)
    prompt = prompt.astype(np.int32)

    def run() -> Iterator[Array]:
        capacity = prompt.shape[1] + steps
        token, cache = _prefill(
            model, prompt, key, heat, capacity=capacity, top_k=top_k, cache_format=cache_format
        )
        yield token[:, None]
        step = 1
        while step < steps and not (stop is not None and bool(jnp.all(token == stop))):
            count = min(chunk, steps - step)
            first = np.int32(step)
            tokens, cache = _decode(
                model, cache, token, key, first, heat, stop, count=count, top_k=top_k
            )
            yield tokens
            token, step = tokens[:, -1], step + count

    return run()


@functools.partial(jax.jit, static_argnames=("capacity", "top_k", "cache_format"))
def _prefill(model, prompt, key, temperature, *, capacity, top_k, cache_format):
    """Reads the prompt: the first new token [batch], and the cache behind it."""
    cache = quantized_cache(model.init_cache(prompt.shape[0], capacity), cache_format)
    # The head sees the last position only: logits of a long prompt would be the largest array.
    logits = model.logits(model.features(prompt, cache)[:, -1])
    return _next_token(logits, key, 0, temperature, top_k), cache


@functools.partial(jax.jit, static_argnames=("count", "top_k"), donate_argnames="cache")
def _decode(model, cache, token, key, first, temperature, stop, *, count, top_k):
    """Writes `count` tokens after `token` [batch]: [batch, count], and the cache behind them."""
    graphdef, state = nnx.split(cache)

    def body(carry, step):
        token, state = carry
        cache = nnx.merge(graphdef, state)
        logits = model.logits(model.features(token[:, None], cache)[:, 0])
        following = _next_token(logits, key, step, temperature, top_k)
        if stop is not None:
            following = jnp.where(token == stop, token, following)
        return (following, nnx.state(cache)), following

    steps = first + jnp.arange(count, dtype=jnp.int32)
    (_, state), tokens = jax.lax.scan(body, (token, state), steps)
    return tokens.T, nnx.merge(graphdef, state)


def _next_token(logits, key, step, temperature, top_k):
    """One token per row of logits [batch, vocab]: the most likely where there is no key."""
    if key is None:
        return jnp.argmax(logits, axis=-1).astype(jnp.int32)
    # One key per position, not a chain of splits: draws do not depend on how steps are grouped.
    return sample(logits, jax.random.fold_in(key, step), temperature, top_k)


def _check(config, prompt, steps, key, temperature, top_k):
    if prompt.ndim != 2 or prompt.shape[1] < 1 or not np.issubdtype(prompt.dtype, np.integer):
        raise ValueError(
            f"generate: the prompt is {prompt.dtype}{list(prompt.shape)}; it must be integers "
            f"[batch, length] with at least one token each."
        )
    if steps < 1:
        raise ValueError(f"generate: steps={steps} must be at least 1.")
    length = prompt.shape[1]
    if length + steps > config.max_length:
        raise ValueError(
            f"generate: {length} prompt tokens + {steps} new ones = {length + steps} tokens, more "
            f"than the model's max_length={config.max_length}. Ask for at most "
            f"{max(0, config.max_length - length)} steps, or shorten the prompt."
        )
    if prompt.size and not (prompt.min() >= 0 and prompt.max() < config.vocab):
        raise ValueError(
            f"generate: prompt tokens from {prompt.min()} to {prompt.max()} do not fit the model's "
            f"vocab={config.vocab}: ids are in [0, {config.vocab}). Use the model's own tokenizer."
        )
    if not 0 <= temperature < float("inf"):
        raise ValueError(f"generate: temperature={temperature} must be finite and at least 0.")
    if temperature > 0 and key is None:
        raise ValueError(
            f"generate: temperature={temperature} draws at random and needs a key: pass "
            f"key=jax.random.key(seed), or temperature=0 for the most likely token."
        )
    if top_k is not None and not 1 <= top_k <= config.vocab:
        raise ValueError(f"generate: top_k={top_k} must be in [1, {config.vocab}], the vocabulary.")
