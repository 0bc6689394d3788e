"""The definition: dequantize inside the program, then an ordinary product."""

from typing import Any

import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from lowbit_jax.ops.activations import rounded


def why_not(meta: Any, act: str | None) -> str | None:
    """None: XLA computes everything."""
    del meta, act
    return None


def prepare_words(words: Any, meta: Any) -> Any:
    """As they are."""
    del meta
    return words


canonical_words = prepare_words


def columns(words: Any, meta: Any, at: Int[Array, "m"]) -> Any:
    """The canonical words of some columns."""
    del meta
    return tuple(jnp.take(plane, at, axis=-1) for plane in words)


def product(
    x: Float[Array, "m k"], matrix: Any, act: str | None, out_dtype: Any
) -> Float[Array, "m n"]:
    """x @ matrix.dequantize()."""
    x = rounded(x, act)
    return jnp.matmul(x, matrix.dequantize(x.dtype), preferred_element_type=out_dtype)
