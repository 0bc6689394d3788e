"""Key/value caches: what one attention layer remembers of the tokens it has seen.

A cache is an object with `length` and `update(key, value) -> (key, value, length)`. The model asks
and answers through these two only, and whoever generates never touches the arrays, so that a cache
may store what it likes (less precise, in pages, on the host) as long as it hands back keys and
values in order of position. One that can answer queries from what it stores, an `AttendingCache`,
is asked for the attention itself.
"""

from typing import Protocol, runtime_checkable

import jax
import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Int32


@runtime_checkable
class LayerCache(Protocol):
    """What one attention layer asks of its cache."""

    @property
    def length(self) -> Int32[Array, ""]:
        """Number of positions held: the position at which the next token stands."""

    def update(
        self,
        key: Float[Array, "batch new kv_heads head_dim"],
        value: Float[Array, "batch new kv_heads head_dim"],
    ) -> tuple[
        Float[Array, "batch capacity kv_heads head_dim"],
        Float[Array, "batch capacity kv_heads head_dim"],
        Int32[Array, ""],
    ]:
        """Appends positions: all keys, all values and the new length; the rest of them is void."""


@runtime_checkable
class AttendingCache(Protocol):
    """A cache that answers queries itself, so that what it holds is never laid out densely."""

    @property
    def length(self) -> Int32[Array, ""]:
        """As of `LayerCache`."""

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
        """Takes positions in; then what `attention.attend` gives their queries over all held.

        Args:
            query: One row for each new position; head `h` asks the key head
                `h // (heads // kv_heads)`.
            key: The new positions' keys.
            value: As `key`.
            window: Positions that a query sees, its own included; 0: all before it.
            scale: As of `attention.attend`.
            softcap: As of `attention.attend`.
        """


class KVCache(nnx.Module):
    """Keys and values of one layer, dense, at a fixed capacity.

    Always: positions `[0, length)` are written, in order; all sequences of a batch are equally
    long.

    Attributes:
        key, value: [batch, kv_heads, capacity, head_dim]: attention multiplies head by head, and
            positions before heads would have to be transposed for every token.
        filled: Positions held, int32.
    """

    def __init__(self, batch: int, capacity: int, kv_heads: int, head_dim: int, dtype: DTypeLike):
        shape = (batch, kv_heads, capacity, head_dim)
        self.key = nnx.Cache(jnp.zeros(shape, dtype))
        self.value = nnx.Cache(jnp.zeros(shape, dtype))
        self.filled = nnx.Cache(jnp.zeros((), jnp.int32))

    @property
    def length(self) -> Int32[Array, ""]:
        """Number of positions held."""
        return self.filled[...]

    @property
    def sizes(self) -> tuple[int, int, int, int]:
        """Batch, capacity, kv_heads and head_dim, of stacked caches those of one."""
        batch, kv_heads, capacity, head_dim = self.key.shape[-4:]
        return batch, capacity, kv_heads, head_dim

    def update(
        self,
        key: Float[Array, "batch new kv_heads head_dim"],
        value: Float[Array, "batch new kv_heads head_dim"],
    ) -> tuple[
        Float[Array, "batch capacity kv_heads head_dim"],
        Float[Array, "batch capacity kv_heads head_dim"],
        Int32[Array, ""],
    ]:
        """Appends positions; see `LayerCache.update`.

        More positions than the capacity holds cannot be an error inside jit, and a clamped write
        would be a wrong answer that looks right: what is written is NaN then, and so is all that
        follows from it.

        Raises: ValueError: one call brings more positions than the cache can ever hold.
        """
        new, capacity = key.shape[1], self.sizes[1]
        if new > capacity:
            raise ValueError(
                f"KVCache: {new} new positions do not fit a capacity of {capacity}. "
                f"Make the cache for the whole context: init_cache(batch, capacity)."
            )
        start = self.filled[...]
        length = start + new
        fits = length <= capacity
        for held, fresh in ((self.key, key), (self.value, value)):
            fresh = jnp.where(fits, fresh, jnp.nan).astype(held.dtype).swapaxes(1, 2)
            held[...] = jax.lax.dynamic_update_slice_in_dim(held[...], fresh, start, axis=2)
        self.filled[...] = length
        return self.key[...].swapaxes(1, 2), self.value[...].swapaxes(1, 2), length
