"""Attention over keys and values held in few bits, which are decoded a stretch at a time.

Scores are linear in the keys, and the result is linear in the values: with one scale per position

    q . (k_scale[s] * k[s]) = k_scale[s] * (q . k[s])
    sum_s p[s] * (v_scale[s] * v[s]) = sum_s (p[s] * v_scale[s]) * v[s]

so that the products take the bare levels (small integers or small floats, exact also in bfloat16),
and scales meet arrays that are `head_dim` times smaller. At no time is more than one stretch of
positions dense: XLA lays the operands of a product out in memory, and what it would lay out for a
whole cache is the float cache that packing was to avoid.

Softmax is taken once, over the scores of all parts, which are small beside what they are made of.
"""

import dataclasses
from typing import Any, Final, Protocol

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Float32, Int32

from lowbit_jax.qtensor import QTensor

CHUNK: Final = 256  # positions: 1 MB of float32 keys, for eight heads of 128


class Rows(Protocol):
    """Packed keys or values of one layer, in order of position."""

    @property
    def positions(self) -> int:
        """How many there is room for."""

    @property
    def unit(self) -> int:
        """Positions that are decoded together; a divisor of `positions`."""

    def decode(
        self, start: Int32[Array, ""] | int, count: int
    ) -> tuple[
        Float[Array, "batch {count} kv_heads head_dim"],
        Float32[Array, "batch {count} kv_heads"] | None,
    ]:
        """Some positions, and the factors that they still have to be multiplied by, if any.

        Args:
            start: First of them; a multiple of `unit`.
            count: How many; a multiple of `unit`.
        """


@dataclasses.dataclass(frozen=True)
class PerPosition:
    """`Rows` of a QTensor [batch, positions, kv_heads, head_dim], a scale per position and head."""

    qtensor: QTensor

    @property
    def positions(self) -> int:
        """See `Rows`."""
        return self.qtensor.shape[1]

    @property
    def unit(self) -> int:
        """See `Rows`."""
        return 1

    def decode(self, start: Any, count: int) -> tuple[Array, Array]:
        """See `Rows`."""
        rows: QTensor = jax.tree.map(
            lambda leaf: jax.lax.dynamic_slice_in_dim(leaf, start, count, axis=1), self.qtensor
        )
        levels = rows.spec.format.decode(rows.codes())
        return levels, rows.plain_scale[..., 0].astype(jnp.float32)


def grouped(
    query: Float[Array, "batch new heads head_dim"], kv_heads: int
) -> Float[Array, "batch new kv_heads group head_dim"]:
    """Query heads beside the key head that they ask, `h // (heads // kv_heads)`."""
    batch, new, heads, width = query.shape
    return query.reshape(batch, new, kv_heads, heads // kv_heads, width)


def dense_scores(
    query: Float[Array, "batch new kv_heads group head_dim"],
    key: Float[Array, "batch seen kv_heads head_dim"],
) -> Float32[Array, "batch kv_heads group new seen"]:
    """Products of every query with every key."""
    key = key.astype(query.dtype)
    return jnp.einsum("btghd,bsgd->bghts", query, key, preferred_element_type=jnp.float32)


def dense_sum(
    weights: Float32[Array, "batch kv_heads group new seen"],
    value: Float[Array, "batch seen kv_heads head_dim"],
    dtype: jnp.dtype,
) -> Float32[Array, "batch new kv_heads group head_dim"]:
    """Sums of values by their weights; products of numbers of `dtype`."""
    return jnp.einsum(
        "bghts,bsgd->btghd",
        weights.astype(dtype),
        value.astype(dtype),
        preferred_element_type=jnp.float32,
    )


def packed_scores(
    query: Float[Array, "batch new kv_heads group head_dim"], keys: Rows, *, chunk: int = CHUNK
) -> Float32[Array, "batch kv_heads group new seen"]:
    """`dense_scores` of packed keys.

    Args:
        query: As of `dense_scores`.
        keys: With at least one position.
        chunk: Positions that are decoded at once, rounded down to whole units.
    """

    def part(start: Array | int, count: int) -> Array:
        levels, scale = keys.decode(start, count)
        scores = dense_scores(query, levels)
        return scores if scale is None else scores * _over_scores(scale)

    whole, size, rest = _stretches(keys, chunk)
    parts = [part(0, size)] if whole == 1 else []
    if whole > 1:
        stacked = jax.lax.map(lambda i: part(i * size, size), jnp.arange(whole))
        parts = [jnp.moveaxis(stacked, 0, -2).reshape(*stacked.shape[1:-1], whole * size)]
    if rest:
        parts.append(part(whole * size, rest))
    return jnp.concatenate(parts, axis=-1)


def packed_sum(
    weights: Float32[Array, "batch kv_heads group new seen"],
    values: Rows,
    dtype: jnp.dtype,
    *,
    chunk: int = CHUNK,
) -> Float32[Array, "batch new kv_heads group head_dim"]:
    """`dense_sum` of packed values; `chunk` as of `packed_scores`."""

    def part(start: Array | int, count: int) -> Array:
        levels, scale = values.decode(start, count)
        share = jax.lax.dynamic_slice_in_dim(weights, start, count, axis=-1)
        return dense_sum(share if scale is None else share * _over_scores(scale), levels, dtype)

    whole, size, rest = _stretches(values, chunk)
    total = part(whole * size, rest) if rest else part(0, size)
    first = 0 if rest else 1
    if whole > first:

        def add(i: Array, total: Array) -> Array:
            return total + part(i * size, size)

        total = jax.lax.fori_loop(first, whole, add, total)
    return total


def joint_softmax(
    scores: Float32[Array, "batch kv_heads group new seen"],
    visible: Bool[Array, "new seen"],
    *,
    head_dim: int,
    scale: float | None,
    softcap: float | None,
) -> Float32[Array, "batch kv_heads group new seen"]:
    """Softmax over what each query sees; `scale` and `softcap` as of `models.attention.attend`."""
    scores = scores * jnp.float32(head_dim**-0.5 if scale is None else scale)
    if softcap is not None:
        scores = softcap * jnp.tanh(scores * jnp.float32(1 / softcap))
    scores = jnp.where(visible[None, None, None], scores, jnp.finfo(jnp.float32).min)
    return jax.nn.softmax(scores, axis=-1)


def _over_scores(scale: Float32[Array, "batch seen kv_heads"]) -> Array:
    """A factor per position and key head in the layout of scores."""
    return jnp.swapaxes(scale, 1, 2)[:, :, None, None, :]


def _stretches(rows: Rows, chunk: int) -> tuple[int, int, int]:
    """How many stretches of how many positions, and how many positions are left over."""
    size = max(chunk // rows.unit, 1) * rows.unit
    return rows.positions // size, size, rows.positions % size
