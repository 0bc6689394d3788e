"""KIVI (arXiv:2402.02750): 2-bit keys per channel and values per token, recent ones in float.

Keys have channels that are large at every position, values have none. A group of key codes is
therefore `group` consecutive positions of one channel, a group of value codes `group` channels of
one position, and each has its own minimum and scale:

    scale = (max x - min x) / (2**bits - 1),   code = round((x - min x) / scale),
    x^ = code * scale + min x

A group of keys cannot be quantized before its last position is there, and recent positions matter
most: a window stays in float. With R its length and l positions held (Algorithm 1)

    keys    [0, l - l % R) are packed, R at a time, the last l % R are not;
    values  [0, max(l - R, 0)) are packed, one at a time, the last R are not.

Position p of either lies in row p % R of its window. A prompt attends to itself in float and is
packed afterwards, a single token enters before it attends: both are the paper's.

Deviations: scale and minimum are rounded to float16 (what they take beside 2-bit codes is 32 bits
a group) before codes are chosen; groups of channels do not cross heads, and a head narrower than a
group is one.
"""

from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Int32

from lowbit_jax.generation.kivi_codes import KeyCodes, KiviSpec, ValueCodes, rows
from lowbit_jax.models.attention import visible
from lowbit_jax.ops import packed_attention as over

__all__ = ["KiviCache", "KiviSpec"]


class KiviCache(nnx.Module):
    """Keys and values of one layer by KIVI, at a fixed capacity; see the module's docstring.

    A `models.LayerCache` and a `models.AttendingCache`.

    Attributes:
        key: `KeyCodes`, room for all whole windows.
        value: `ValueCodes`, room for all but one window.
        key_window, value_window: [batch, window, kv_heads, head_dim], in the dtype of the model.
        filled: Positions held, int32.
    """

    def __init__(
        self,
        batch: int,
        capacity: int,
        kv_heads: int,
        head_dim: int,
        dtype: DTypeLike,
        spec: KiviSpec,
    ):
        """An empty cache of `capacity` positions."""
        heads, dtype = (kv_heads, head_dim), jnp.dtype(dtype)
        self.spec, self.capacity = spec, capacity
        self.key = KeyCodes(batch, capacity // spec.window * spec.window, heads, dtype, spec)
        self.value = ValueCodes(batch, max(capacity - spec.window, 0), heads, dtype, spec)
        self.key_window = nnx.Cache(jnp.zeros((batch, spec.window, *heads), dtype))
        self.value_window = nnx.Cache(jnp.zeros((batch, spec.window, *heads), dtype))
        self.filled = nnx.Cache(jnp.zeros((), jnp.int32))

    @property
    def length(self) -> Int32[Array, ""]:
        """Number of positions held."""
        return self.filled[...]

    @property
    def packed(self) -> tuple[Int32[Array, ""], Int32[Array, ""]]:
        """Up to which position keys, and values, are packed."""
        length, window = self.length, self.spec.window
        return length - length % window, jnp.maximum(length - window, 0)

    def update(
        self,
        key: Float[Array, "batch new kv_heads head_dim"],
        value: Float[Array, "batch new kv_heads head_dim"],
    ) -> tuple[
        Float[Array, "batch capacity kv_heads head_dim"],
        Float[Array, "batch capacity kv_heads head_dim"],
        Int32[Array, ""],
    ]:
        """Appends positions; see `models.LayerCache.update` and, for a full cache, `KVCache`.

        Raises: ValueError: One call brings more positions than the cache can ever hold.
        """
        self._take_in(*self._fitting(key, value))
        at = jnp.arange(self.capacity)

        def dense(codes: Any, window: Array, packed: Array) -> Array:
            recent = jnp.take(window, at % self.spec.window, axis=1)
            if codes.positions == 0:
                return recent
            padding = [(0, 0), (0, self.capacity - codes.positions), (0, 0), (0, 0)]
            old = jnp.pad(codes.decode(0, codes.positions)[0], padding)
            return jnp.where((at < packed)[None, :, None, None], old, recent)

        keys, values = self.packed
        return (
            dense(self.key, self.key_window[...], keys),
            dense(self.value, self.value_window[...], values),
            self.length,
        )

    def attend(
        self,
        query: Float[Array, "batch new heads head_dim"],
        key: Float[Array, "batch new kv_heads head_dim"],
        value: Float[Array, "batch new kv_heads head_dim"],
        *,
        window: int = 0,
        scale: float | None = None,
        softcap: float | None = None,
    ) -> Float[Array, "batch new heads head_dim"]:
        """See `models.AttendingCache.attend`; several positions see each other in float.

        Raises: ValueError: One call brings more positions than the cache can ever hold.
        """
        key, value = self._fitting(key, value)
        new, start = key.shape[1], self.length
        positions = start + jnp.arange(new, dtype=jnp.int32)
        if new == 1:
            self._take_in(key, value)
        asked = over.grouped(query, key.shape[2])
        held = jnp.arange(self.capacity)[None, :] < self.length
        scores = [self._scores(asked)]
        masks = [visible(positions, self.capacity, window) & held]
        if new > 1:
            scores.append(over.dense_scores(asked, key))
            masks.append(visible(positions - start, new, window))
        weights = over.joint_softmax(
            jnp.concatenate(scores, axis=-1),
            jnp.concatenate(masks, axis=-1),
            head_dim=query.shape[-1],
            scale=scale,
            softcap=softcap,
        )
        y = self._sum(weights[..., : self.capacity], query.dtype)
        if new > 1:
            y = y + over.dense_sum(weights[..., self.capacity :], value, query.dtype)
            self._take_in(key, value)
        return y.reshape(query.shape).astype(query.dtype)

    def _scores(self, query: Array) -> Array:
        """Scores of all held keys in order of position: [.., new, capacity]."""
        window = self.spec.window
        recent = over.dense_scores(query, self.key_window[...])
        recent = jnp.take(recent, jnp.arange(self.capacity) % window, axis=-1)
        if self.key.positions == 0:
            return recent
        old = over.packed_scores(query, self.key)
        old = jnp.pad(old, [(0, 0)] * 4 + [(0, self.capacity - self.key.positions)])
        is_old = jnp.arange(self.capacity) < self.packed[0]
        return jnp.where(is_old[None, None, None, None], old, recent)

    def _sum(self, weights: Array, dtype: jnp.dtype) -> Array:
        """Sum of all held values by weights [.., new, capacity] in order of position."""
        window, packed = self.spec.window, self.packed[1]
        # The latest position that fell on each row of the window, if any did.
        latest = self.length - 1 - (self.length - 1 - jnp.arange(window)) % window
        recent = jnp.take(weights, jnp.maximum(latest, 0), axis=-1)
        recent = jnp.where((latest >= 0)[None, None, None, None], recent, 0.0)
        total = over.dense_sum(recent, self.value_window[...], dtype)
        if self.value.positions == 0:
            return total
        is_old = jnp.arange(self.value.positions) < packed
        old = weights[..., : self.value.positions]
        old = jnp.where(is_old[None, None, None, None], old, 0.0)
        return total + over.packed_sum(old, self.value, dtype)

    def _fitting(self, key: Array, value: Array) -> tuple[Array, Array]:
        """New positions in the dtype of the cache; NaN where they are more than there is room for.

        Their values are always in the window, so that NaN reaches whatever attends afterwards.
        """
        new = key.shape[1]
        if new > self.capacity:
            raise ValueError(
                f"KiviCache: {new} new positions do not fit a capacity of {self.capacity}. Make "
                "the cache for the whole context: init_cache(batch, capacity)."
            )
        fits, dtype = self.length + new <= self.capacity, self.key_window.dtype
        return (
            jnp.where(fits, key, jnp.nan).astype(dtype),
            jnp.where(fits, value, jnp.nan).astype(dtype),
        )

    def _take_in(self, key: Array, value: Array) -> None:
        """Appends positions: those that leave the windows are packed."""
        start, new, window = self.length, key.shape[1], self.spec.window
        blocks = (2 * window - 2 + new) // window  # that new positions can lie in, wherever they do
        line = jnp.pad(self.key_window[...], [(0, 0), (0, (blocks - 1) * window), (0, 0), (0, 0)])
        line = jax.lax.dynamic_update_slice_in_dim(line, key, start % window, axis=1)
        complete = (start % window + new) // window
        if self.key.positions:
            self.key.write(line, start // window, complete)
        self.key_window[...] = rows(line, jnp.minimum(complete, blocks - 1) * window, window)

        kept, fresh = min(new, window), self.value_window[...]
        first = start + jnp.arange(kept)
        if self.value.positions:
            leaving = jnp.take(fresh, first % window, axis=1)
            leaving = jnp.concatenate([leaving, value[:, : new - kept]], axis=1)
            self.value.write(leaving, start - window)
        last = (first + (new - kept)) % window
        self.value_window[...] = fresh.at[:, last].set(value[:, new - kept :])
        self.filled[...] = start + new
