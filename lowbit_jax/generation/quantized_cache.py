"""Key/value caches that hold fewer bits: every position of every head is rounded when it enters.

A row of head_dim elements gets one scale, its largest magnitude, as activations per token do, so
that it can multiply a score or a weight instead of a key or a value: attention takes the codes as
they lie, and no dense cache is ever made (see `ops.attend`, which has kernels for TPU and Hopper).

`quantized_cache` also makes KIVI's cache, which has a module of its own.
"""

import functools
from collections.abc import Mapping
from types import MappingProxyType
from typing import Any, Final, Literal

import jax
import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Int32

from lowbit_jax import ops
from lowbit_jax.formats import FP8_E4M3, INT4, INT8
from lowbit_jax.generation.kivi import KiviCache, KiviSpec
from lowbit_jax.models import KVCache
from lowbit_jax.ops.attention import Implementation
from lowbit_jax.qtensor import QTensor, quantize
from lowbit_jax.scale_formats import FLOAT16
from lowbit_jax.spec import PerToken, QuantSpec

CacheFormat = Literal["float", "int8", "fp8", "int4", "kivi2", "kivi4"]
SPECS: Final[Mapping[str, QuantSpec]] = MappingProxyType(
    {
        name: QuantSpec(format=fmt, granularity=PerToken(), scale_format=FLOAT16)
        for name, fmt in (("int8", INT8), ("fp8", FP8_E4M3), ("int4", INT4))
    }
)
KIVI: Final[Mapping[str, KiviSpec]] = MappingProxyType(
    {"kivi2": KiviSpec(bits=2), "kivi4": KiviSpec(bits=4)}
)


class QuantizedKVCache(nnx.Module):
    """Keys and values of one layer, quantized per position and head, at a fixed capacity.

    A `models.LayerCache` and a `models.AttendingCache`: rows `[0, length)` along the second axis
    are written, in order.

    Attributes:
        key, value: QTensor [batch, capacity, kv_heads, head_dim].
        filled: Positions held, int32.
        implementation: What attends; see `ops.attend`.
    """

    def __init__(
        self,
        batch: int,
        capacity: int,
        kv_heads: int,
        head_dim: int,
        dtype: DTypeLike,
        spec: QuantSpec,
        *,
        implementation: Implementation | None = None,
    ):
        """An empty cache whose `update` gives arrays of `dtype`."""
        self.implementation = implementation
        shape = (batch, capacity, kv_heads, head_dim)
        # An array each: the program that writes tokens donates them.
        self.key = nnx.Cache(_empty(shape, jnp.dtype(dtype), spec))
        self.value = nnx.Cache(_empty(shape, jnp.dtype(dtype), spec))
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
        self._take_in(key, value)
        held_key, held_value = self.key.get_value(), self.value.get_value()
        return held_key.dequantize(), held_value.dequantize(), self.length

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
        """See `models.AttendingCache.attend`; new positions, too, are seen as they are held.

        Raises: ValueError: One call brings more positions than the cache can ever hold.
        """
        self._take_in(key, value)
        return ops.attend(
            query,
            self.key.get_value(),
            self.value.get_value(),
            self.length,
            window=window,
            scale=scale,
            softcap=softcap,
            implementation=self.implementation,
        )

    def _take_in(self, key: Array, value: Array) -> None:
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


@functools.partial(jax.jit, static_argnums=(0, 1, 2), inline=True)
def _empty(shape: tuple[int, ...], dtype: Any, spec: QuantSpec) -> QTensor:
    """Zeros; one program, where the operations of `quantize` would be compiled one by one."""
    return quantize(jnp.zeros(shape, dtype), spec)


def _written(held: QTensor, fresh: Array, start: Array, fits: Array) -> QTensor:
    """`held` with rows from `start` on replaced; what does not fit becomes NaN by its scale."""
    added = quantize(fresh.astype(held.dtype), held.spec)

    def put(old: Array, new: Array) -> Array:
        return jax.lax.dynamic_update_slice_in_dim(old, new, start, axis=1)

    written: QTensor = jax.tree.map(put, held, added)
    scale = jnp.where(fits, written.plain_scale, jnp.full_like(written.plain_scale, jnp.nan))
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
        cache: From `init_cache`: a `KVCache` per layer, in an `nnx.List`, or stacked into one.
        cache_format: "int8", "fp8" (e4m3), "int4", "kivi2" or "kivi4"; "float" gives `cache` back.

    Raises:
        ValueError: An unknown format, or heads whose width it does not split into groups.
        NotImplementedError: A cache of another kind: a model's own class.
    """
    if cache_format == "float":
        return cache
    if cache_format not in (*SPECS, *KIVI):
        raise ValueError(
            f"there is no cache format {cache_format!r}. Formats: {['float', *SPECS, *KIVI]}."
        )
    if isinstance(cache, KVCache):
        return _stacked(_one(cache, cache_format), cache.key.shape[0])
    if not isinstance(cache, nnx.List) or not all(isinstance(one, KVCache) for one in cache):
        raise NotImplementedError(
            f"a {cache_format} cache takes the place of a KVCache, one per layer in a list or all "
            f"of them stacked; this model has a {type(cache).__name__}. Use cache_format='float'."
        )
    return nnx.List([_one(one, cache_format) for one in cache])


def _one(dense: KVCache, cache_format: CacheFormat) -> nnx.Module:
    """The empty cache of one layer, of the sizes of a dense one."""
    if cache_format in KIVI:
        return KiviCache(*dense.sizes, dense.key.dtype, KIVI[cache_format])
    return QuantizedKVCache(*dense.sizes, dense.key.dtype, SPECS[cache_format])


def _stacked(cache: nnx.Module, layers: int) -> nnx.Module:
    """As many equal caches as one, every array with a new first axis."""
    graphdef, state = nnx.split(cache)

    def repeated(array: Array) -> Array:
        return jnp.broadcast_to(array[None], (layers, *array.shape))

    return nnx.merge(graphdef, jax.tree.map(repeated, state))
