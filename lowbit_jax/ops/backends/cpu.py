"""C++ kernels behind XLA's foreign function interface."""

from typing import Any, Literal, cast

import jax.numpy as jnp
from jaxtyping import Array, Float, Int

import kernels_cpu
from lowbit_jax.formats import IntGrid
from lowbit_jax.ops.activations import rounded
from lowbit_jax.ops.backends import levels


def why_not(meta: Any, act: str | None) -> str | None:
    """Why there are no kernels: none were built, or none for such codes."""
    if reason := kernels_cpu.missing():
        return reason
    if act == "fp8":
        return "fp8 activations gain nothing on a CPU; use act='int8'"
    if reason := levels.why_not(meta.spec.format):
        return reason
    return kernels_cpu.unsupported(_codes(meta), None)


def prepare_words(words: tuple[Array, ...], meta: Any) -> tuple[Array, ...]:
    """In panels of 16 columns, read from front to back."""
    del meta
    return tuple(kernels_cpu.panels(plane) for plane in words)


def canonical_words(words: tuple[Array, ...], meta: Any) -> tuple[Array, ...]:
    """The inverse of `prepare_words`."""
    return tuple(kernels_cpu.unpanels(plane, meta.n) for plane in words)


def columns(words: tuple[Array, ...], meta: Any, at: Int[Array, "m"]) -> tuple[Array, ...]:
    """The canonical words of some columns."""
    del meta
    panel, lane = at // kernels_cpu.PANEL, at % kernels_cpu.PANEL
    return tuple(plane[panel, :, lane].T for plane in words)


def product(
    x: Float[Array, "m k"], matrix: Any, act: str | None, out_dtype: Any
) -> Float[Array, "m n"]:
    """x @ matrix in float32, rounded once to `out_dtype`.

    With int8 activations the sums are exact integers where the values of the codes are integers
    (times a power of two); for others (NF4), the rounded activations enter a float product.
    """
    codes, x = _codes(matrix.meta), x.astype(jnp.float32)
    integers = act is not None and kernels_cpu.unsupported(codes, "int8") is None
    y = kernels_cpu.matmul(
        x if integers else rounded(x, act),
        matrix.words,
        matrix.scale,
        matrix.zero_point,
        codes=codes,
        n=matrix.meta.n,
        act=cast(Literal["int8"], act) if integers else None,
    )
    return y.astype(out_dtype)


def _codes(meta: Any) -> kernels_cpu.Codes:
    fmt, group = meta.spec.format, meta.group
    if isinstance(fmt, IntGrid):
        return kernels_cpu.Codes(fmt.bits, float(fmt.step), fmt.low, group=group)
    return kernels_cpu.Codes(fmt.bits, table=levels.table(fmt), group=group)
