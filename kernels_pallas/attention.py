"""Attention of one new token over keys and values held in 8 or 4 bits (kernel K8).

A decoded token reads every key and value once and multiplies little: what counts is that the packed
words are what is read. Scales stand outside of the products, because every position of every head
has one:

    q . (ks[s] * k[s]) = ks[s] * (q . k[s])
    sum_s p[s] * (vs[s] * v[s]) = sum_s (p[s] * vs[s]) * v[s]

so that codes become small integers (or e4m3 numbers), exact in bfloat16, and are multiplied so.
Positions are cut into `splits` parts that are worked on at the same time, each with its own softmax
(flash-decoding); a part leaves its sum o, its largest score m and its sum of weights l, and `merge`
joins the parts in their order: the same bits in every run.

Words lie as the cache holds them, [B, S, H, W], with 32 / bits consecutive features in each word.
Field f of word w is feature w * F + f: the kernels multiply one field after the other, with the
query's features in the same order, and put the result's back at the end.
"""

import dataclasses
import functools
from typing import Any, Final, Literal

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from kernels_pallas.activations import truncated

FIELDS: Final = {"int8": 4, "fp8": 4, "int4": 8}
"""Codes in one word; int8 is code - 128, int4 code - 8, fp8 the bits of an e4m3 number."""
LOWEST: Final = -1e30  # below every score, and no infinity, whose differences are NaN


@dataclasses.dataclass(frozen=True, kw_only=True)
class Attention:
    """What is static about one call.

    Attributes:
        fmt: "int8", "int4" or "fp8" (e4m3).
        kv_heads: Key heads; query head h asks key head h // (heads // kv_heads).
        heads: Query heads.
        head_dim: Features of a head.
        scale: Factor of the scores.
        softcap: Scores s become softcap * tanh(s / softcap); None: they stay.

    Raises:
        ValueError: A field that no call can have.
    """

    fmt: Literal["int8", "int4", "fp8"]
    kv_heads: int
    heads: int
    head_dim: int
    scale: float
    softcap: float | None = None

    def __post_init__(self) -> None:
        if self.fmt not in FIELDS:
            raise ValueError(f"Attention: fmt is one of {list(FIELDS)}, not {self.fmt!r}.")
        if self.kv_heads < 1 or self.heads % self.kv_heads or self.heads < 1:
            raise ValueError(f"Attention: {self.heads} heads over {self.kv_heads} key heads.")
        if self.head_dim < 1:
            raise ValueError(f"Attention: heads of {self.head_dim} features.")

    @property
    def fields(self) -> int:
        """Codes in a word."""
        return FIELDS[self.fmt]

    @property
    def words(self) -> int:
        """Words of one head at one position, padding included."""
        return -(-self.head_dim // 32) * 32 // self.fields

    @property
    def group(self) -> int:
        """Query heads of one key head."""
        return self.heads // self.kv_heads


def levels(words: jax.Array, field: int, fmt: str) -> jax.Array:
    """What the codes of one field stand for, float32; in operations that both compilers know."""
    width = 4 if fmt == "int4" else 8
    shift = field * width
    code = lax.shift_right_logical(words, np.int32(shift)) if shift else words
    code = code & np.int32(2**width - 1)
    if fmt != "fp8":
        return _counted(code, 2.0 ** (width - 1))
    magnitude = code & np.int32(0x7F)
    normal = (magnitude << np.int32(20)) + np.int32(120 << 23)
    # Subnormal float32 numbers are not an option: some of the hardware takes them for zero.
    small = _counted(magnitude, 0.0) * np.float32(2.0**-9)
    value = jnp.where(magnitude < 8, small, lax.bitcast_convert_type(normal, jnp.float32))
    return jnp.where(code >= 128, -value, value)


def _counted(code: jax.Array, less: float) -> jax.Array:
    """code - less as float32, without a conversion: code | bits of 2**23 is 2**23 + code."""
    magic = lax.bitcast_convert_type(code | np.int32(0x4B000000), jnp.float32)
    return magic - np.float32(2.0**23 + less)


def capped(scores: jax.Array, attention: Attention) -> jax.Array:
    """Scores times their factor, behind the soft cap."""
    scores = scores * np.float32(attention.scale)
    if attention.softcap is None:
        return scores
    return jnp.tanh(scores * np.float32(1 / attention.softcap)) * np.float32(attention.softcap)


def split(x: jax.Array, parts: int) -> list[jax.Array]:
    """float32 as a sum of bfloat16 numbers, as `activations.split`, in float32."""
    found, rest = [], x
    for _ in range(parts - 1):
        high = truncated(rest)
        found.append(high)
        rest = rest - high
    return [*found, rest]


def by_field(query: jax.Array, attention: Attention) -> jax.Array:
    """query [B, heads, D] -> [B, kv_heads, F, group, W], zeros where the words are padded."""
    padding = attention.words * attention.fields - attention.head_dim
    query = jnp.pad(query, [(0, 0), (0, 0), (0, padding)])
    split_ = (attention.kv_heads, attention.group, attention.words, attention.fields)
    return jnp.transpose(query.reshape(-1, *split_), (0, 1, 4, 2, 3))


def merge(sums: jax.Array, largest: jax.Array, weights: jax.Array) -> jax.Array:
    """Parts [B, splits, ..., D], [B, splits, ...] twice -> [B, ..., D]; one after the other."""
    count = sums.shape[1]
    most = functools.reduce(jnp.maximum, [largest[:, i] for i in range(count)])
    total, whole = jnp.zeros_like(sums[:, 0]), jnp.zeros_like(weights[:, 0])
    for i in range(count):
        share = jnp.exp(largest[:, i] - most)
        total = total + sums[:, i] * share[..., None]
        whole = whole + weights[:, i] * share
    return total / whole[..., None]


def dense64(words: Any, scale: Any, attention: Attention) -> np.ndarray:
    """Keys or values in float64: [B, S, H, D]."""
    words = np.asarray(words).view(np.uint32)
    width = 32 // attention.fields
    shifts = np.arange(attention.fields, dtype=np.uint32) * np.uint32(width)
    codes = (words[..., None] >> shifts) & np.uint32(2**width - 1)
    codes = codes.reshape(*words.shape[:-1], -1)[..., : attention.head_dim]
    if attention.fmt == "fp8":
        values = codes.astype(np.uint8).view(jnp.float8_e4m3fn).astype(np.float64)
    else:
        values = codes.astype(np.float64) - 2 ** (width - 1)
    return values * np.asarray(scale, np.float64)[..., None]


def reference64(
    query: Any,
    keys: tuple[Any, Any],
    values: tuple[Any, Any],
    start: int,
    stop: int,
    attention: Attention,
) -> np.ndarray:
    """The result in float64, [B, heads, D]; arguments as of `api.attend`."""
    key, value = dense64(*keys, attention), dense64(*values, attention)
    key, value = key[:, start:stop], value[:, start:stop]
    query = np.asarray(query, np.float64)
    query = query.reshape(len(query), attention.kv_heads, attention.group, -1)
    scores = np.einsum("bhgd,bshd->bhgs", query, key) * attention.scale
    if attention.softcap is not None:
        scores = attention.softcap * np.tanh(scores / attention.softcap)
    weights = np.exp(scores - scores.max(axis=-1, keepdims=True))
    weights /= weights.sum(axis=-1, keepdims=True)
    y = np.einsum("bhgs,bshd->bhgd", weights, value)
    return y.reshape(len(y), attention.heads, -1)
