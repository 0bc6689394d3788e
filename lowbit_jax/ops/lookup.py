"""`lookup(tokens, qtensor)`: columns of a packed embedding, dequantized one by one."""

import dataclasses

import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from lowbit_jax.ops import backends
from lowbit_jax.ops.prepared import Prepared, canonical
from lowbit_jax.qtensor import QTensor
from lowbit_jax.spec import Block


def lookup(tokens: Int[Array, "*batch"], qtensor: QTensor | Prepared) -> Float[Array, "*batch k"]:
    """Rows of the embedding whose matrix view is `qtensor`: `dequantize().T[tokens]`.

    Only the words and scales of the looked-up columns are read: the dense table is never made.

    Args:
        tokens: Indices in `[0, N)`; like `jnp.take`, negative ones count from the end, and one
            outside gives NaN.
        qtensor: [K, N]: K features, N entries; or what `prepare` made of it.

    Raises:
        NotImplementedError: Blocks of several columns, which have no column of their own.
    """
    spec = qtensor.meta.spec if isinstance(qtensor, Prepared) else qtensor.spec
    if not isinstance(spec.granularity, Block) or spec.granularity.n not in (None, 1):
        raise NotImplementedError(
            f"lookup: {spec.describe()} shares scales between entries. Use per-tensor, "
            "per-channel or grouped scales for embeddings."
        )
    matrix = qtensor if isinstance(qtensor, Prepared) else canonical(qtensor)
    flat, n = tokens.reshape(-1), matrix.meta.n
    inside = (flat >= -n) & (flat < n)
    at = jnp.where(inside, jnp.where(flat < 0, flat + n, flat), jnp.zeros_like(flat))
    words = backends.get(matrix.meta.target).columns(matrix.words, matrix.meta, at)
    zero_point = None if matrix.zero_point is None else jnp.take(matrix.zero_point, at, axis=-1)
    meta = dataclasses.replace(matrix.meta, n=at.size, target="xla")
    basis = None if matrix.basis is None else jnp.take(matrix.basis, at, axis=-1)
    picked = Prepared(words, jnp.take(matrix.scale, at, axis=-1), zero_point, meta, basis)
    entries = picked.dequantize().T
    entries = jnp.where(inside[:, None], entries, jnp.full_like(entries, jnp.nan))
    return entries.reshape(*tokens.shape, matrix.meta.k)
