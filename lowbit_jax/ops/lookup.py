"""`lookup(tokens, qtensor)`: columns of a packed embedding, dequantized one by one."""

from typing import Any

import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from lowbit_jax.qtensor import QTensor
from lowbit_jax.spec import Block


def lookup(tokens: Int[Array, "*batch"], qtensor: QTensor) -> Float[Array, "*batch k"]:
    """Rows of the embedding whose matrix view is `qtensor`: `dequantize().T[tokens]`.

    Only the words and scales of the looked-up columns are read: the dense table is never made.

    Args:
        tokens: Indices in `[0, N)`; like `jnp.take`, negative ones count from the end, and one
            outside gives NaN.
        qtensor: [K, N]: K features, N entries.

    Raises:
        NotImplementedError: Blocks of several columns, which have no column of their own.
    """
    granularity = qtensor.spec.granularity
    if not isinstance(granularity, Block) or granularity.n not in (None, 1):
        raise NotImplementedError(
            f"lookup: {qtensor.spec.describe()} shares scales between entries. Use per-tensor, "
            "per-channel or grouped scales for embeddings."
        )
    flat = tokens.reshape(-1)

    def columns(array: Any) -> Any:
        if array is None or array.shape[-1] == 1:
            return array
        return jnp.take(array, flat, axis=-1)

    picked = QTensor(
        words=tuple(jnp.take(plane, flat, axis=-1) for plane in qtensor.words),
        scale=columns(qtensor.scale),
        zero_point=columns(qtensor.zero_point),
        global_scale=qtensor.global_scale,
        spec=qtensor.spec,
        k=qtensor.k,
        dtype=qtensor.dtype,
    )
    n = qtensor.shape[-1]
    inside = ((flat >= -n) & (flat < n))[:, None]
    entries = picked.dequantize().T
    entries = jnp.where(inside, entries, jnp.full_like(entries, jnp.nan))
    return entries.reshape(*tokens.shape, qtensor.k)
