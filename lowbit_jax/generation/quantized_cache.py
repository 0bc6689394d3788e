"""Key/value caches that hold fewer bits: every position of every head is rounded when it enters.

A row of head_dim elements gets one scale, its largest magnitude, as activations per token do.
`update` hands back dense keys and values, dequantized inside the program: what is saved is what
lies in memory between tokens.
"""

from collections.abc import Mapping
from types import MappingProxyType
from typing import Any, Final, Literal

import jax
import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Int32

from lowbit_jax.formats import FP8_E4M3, INT4, INT8
from lowbit_jax.models import KVCache
from lowbit_jax.qtensor import QTensor, quantize
from lowbit_jax.spec import FLOAT16, PerToken, QuantSpec

CacheFormat = Literal["float", "int8", "fp8", "int4"]
SPECS: Final[Mapping[str, QuantSpec]] = MappingProxyType(
    {
        name: QuantSpec(format=fmt, granularity=PerToken(), scale_format=FLOAT16)
        for name, fmt in (("int8", INT8), ("fp8", FP8_E4M3), ("int4", INT4))
    }
)


class QuantizedKVCache(nnx.Module):
    """Keys and values of one layer, quantized per position and head, at a fixed capacity.

    A `models.LayerCache`: rows `[0, length)` along the second axis are written, in order.

    Attributes:
        key, value: QTensor [batch, capacity, kv_heads, head_dim].
        filled: Positions held, int32.
    """

    def __init__(
        self,
        batch: int,
        capacity: int,
        kv_heads: int,
        head_dim: int,
        dtype: DTypeLike,
        spec: QuantSpec,
    ):
        """An empty cache whose `update` gives arrays of `dtype`."""
        empty = jnp.zeros((batch, capacity, kv_heads, head_dim), dtype)
        self.key = nnx.Cache(quantize(empty, spec))
        self.value = nnx.Cache(quantize(empty, spec))
        self.filled = nnx.Cache(jnp.zeros((), jnp.int32))

    @property
    def length(self) -> Int32[Array, ""]:
        """Number of positions held."""
        return self.filled[...]

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
        new, capacity = key.shape[1], self.key.get_value().shape[1]
        if new > capacity:
            raise ValueError(
                f"QuantizedKVCache: {new} new positions do not fit a capacity of {capacity}. Make "
                "the cache for the whole context: init_cache(batch, capacity)."
            )
        start = self.filled[...]
        length = start + new
        for held, fresh in ((self.key, key), (self.value, value)):
            held.set_value(_written(held.get_value(), fresh, start, length <= capacity))
        self.filled[...] = length
        return self.key.get_value().dequantize(), self.value.get_value().dequantize(), length


def _written(held: QTensor, fresh: Array, start: Array, fits: Array) -> QTensor:
    """`held` with rows from `start` on replaced; what does not fit becomes NaN by its scale."""
    added = quantize(fresh.astype(held.dtype), held.spec)

    def put(old: Array, new: Array) -> Array:
        return jax.lax.dynamic_update_slice_in_dim(old, new, start, axis=1)

    written: QTensor = jax.tree.map(put, held, added)
    scale = jnp.where(fits, written.scale, jnp.full_like(written.scale, jnp.nan))
    return QTensor(
        words=written.words,
        scale=scale,
        zero_point=None,
        global_scale=None,
        spec=held.spec,
        k=held.k,
        dtype=held.dtype,
    )


def quantized_cache(cache: nnx.Module, cache_format: CacheFormat) -> nnx.Module:
    """An empty quantized cache in the place of a model's own empty one.

    Args:
        cache: From `init_cache`: a `KVCache` per layer, in an `nnx.List`.
        cache_format: "int8", "fp8" (e4m3) or "int4"; "float" gives `cache` back.

    Raises:
        ValueError: An unknown format.
        NotImplementedError: A cache of another kind: stacked layers, or a model's own class.
    """
    if cache_format == "float":
        return cache
    if cache_format not in SPECS:
        raise ValueError(
            f"there is no cache format {cache_format!r}. Formats: {['float', *SPECS]}."
        )
    if not isinstance(cache, nnx.List) or not all(isinstance(one, KVCache) for one in cache):
        raise NotImplementedError(
            f"a {cache_format} cache takes the place of a list of KVCache, one per layer; this "
            f"model has a {type(cache).__name__}. Stacked layers: load the model unstacked, or use "
            "cache_format='float'."
        )

    def like(one: Any) -> QuantizedKVCache:
        batch, capacity, kv_heads, head_dim = one.key.shape
        spec = SPECS[cache_format]
        return QuantizedKVCache(batch, capacity, kv_heads, head_dim, one.key.dtype, spec)

    return nnx.List([like(one) for one in cache])
