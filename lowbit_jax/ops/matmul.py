"""`matmul(x, qtensor)`: one operation for every format, whatever computes it."""

import math
from typing import Final, Literal

import jax.numpy as jnp
from jaxtyping import Array, Float

from lowbit_jax.ops import backends, rules
from lowbit_jax.ops.activations import SPECS
from lowbit_jax.ops.backends import mosaic
from lowbit_jax.ops.prepared import Prepared, canonical
from lowbit_jax.qtensor import QTensor
from lowbit_jax.spec import Block

Implementation = Literal["mosaic_gpu", "mosaic_tpu", "cpu", "xla", "interpret"]
PREFILL: Final = 1024
"""Float rows from which on a GPU dequantizes the matrix once, for cuBLAS, unless told otherwise.

The Hopper kernel is made for decoding, and unpacks a weight anew for each of its blocks of rows.
"""
_NAMES = ("mosaic_gpu", "mosaic_tpu", "cpu", "xla", "interpret")


def matmul(
    x: Float[Array, "*batch k"],
    qtensor: QTensor | Prepared,
    *,
    act: Literal["int8", "fp8"] | None = None,
    implementation: Implementation | None = None,
    out_dtype: jnp.dtype | None = None,
    bias: Float[Array, "n"] | None = None,
) -> Float[Array, "*batch n"]:
    """x @ qtensor.dequantize(), in the dtype of `x`.

    Every implementation is within the rounding of float32 sums of the same result. Gradients flow
    to `x` (through `act` straight), the scales and the bias.

    Args:
        x: Activations; with an empty batch, an empty result.
        qtensor: Kernel [K, N], or what `prepare` made of it.
        act: Rounds `x` per token first, by its largest magnitude: "int8" (-127 .. 127) or "fp8"
            (e4m3). The product is then a sum of integers, where the kernel's codes are integers and
            the implementation has one.
        implementation: "cpu" (C++), "mosaic_gpu", "mosaic_tpu" (Pallas), "interpret" (the kernel of
            the TPU in Pallas' interpreter), "xla" (dequantize inside the program). None chooses by
            platform, matrix and rows (from `PREFILL` float rows on, a GPU takes "xla"); a name
            obeys or raises.
        out_dtype: Of the result; default that of `x`.
        bias: Added to the product.

    Raises:
        ValueError: The lengths of K differ, the kernel is not a matrix, x is not float, an unknown
            implementation or activation format.
        NotImplementedError: The named implementation does not compute this here; the message says
            why.
    """
    _check(x, qtensor, act, implementation, bias)
    matrix = qtensor if isinstance(qtensor, Prepared) else canonical(qtensor)
    lead = x.shape[:-1]
    name = implementation or _choose(matrix, act, math.prod(lead))
    _check_implementation(matrix, name, act)
    dtype = jnp.dtype(out_dtype or x.dtype)
    flat = x.reshape(math.prod(lead), x.shape[-1])
    y = rules.product(flat, matrix, name, act, dtype).reshape(*lead, matrix.meta.n)
    if bias is not None:
        y = y + bias.astype(y.dtype).reshape((1,) * (y.ndim - 1) + bias.shape)
    return y


def _choose(matrix: Prepared, act: str | None, rows: int) -> str:
    target = matrix.meta.target
    if target == "xla":
        name = backends.choose(matrix.meta, act)
    else:
        name = target if backends.get(target).why_not(matrix.meta, act) is None else "xla"
    return "xla" if name == "mosaic_gpu" and act is None and rows >= PREFILL else name


def _check_implementation(matrix: Prepared, name: str, act: str | None) -> None:
    backend = mosaic.INTERPRETED if name == "interpret" else backends.get(name)
    reason = backend.why_not(matrix.meta, act)
    if reason is None and matrix.meta.target not in ("xla", name) and name != "xla":
        reason = f"the matrix was prepared for {matrix.meta.target!r}"
    if reason is not None:
        raise NotImplementedError(
            f"matmul: implementation {name!r} does not compute {matrix.meta.spec.describe()} of "
            f"shape {matrix.shape} with act={act!r} here: {reason}. implementation=None chooses "
            "one that does."
        )


def _check(x, qtensor, act, implementation, bias) -> None:
    if implementation not in (None, *_NAMES):
        raise ValueError(
            f"matmul: there is no implementation {implementation!r}. Implementations: "
            f"{list(_NAMES)}, or None."
        )
    if act not in (None, *SPECS):
        raise ValueError(f"matmul: there is no act={act!r}. Formats: {list(SPECS)}, or None.")
    if isinstance(qtensor, QTensor) and not isinstance(qtensor.spec.granularity, Block):
        raise ValueError(
            f"matmul: the kernel is quantized {qtensor.spec.describe()}, as activations are; a "
            "kernel's scales are per tensor, channel, group or block."
        )
    shape = qtensor.shape
    if len(shape) != 2 or x.ndim < 1 or x.shape[-1] != shape[0]:
        raise ValueError(
            f"matmul: x of shape {tuple(x.shape)} against a kernel of shape {shape}: needs "
            "a kernel [K, N] and K as the last axis of x. Map over a stack with jax.vmap."
        )
    if not jnp.issubdtype(x.dtype, jnp.floating):
        raise ValueError(f"matmul: x has dtype {x.dtype}; activations are float.")
    if bias is not None and bias.shape != (shape[1],):
        raise ValueError(f"matmul: bias of shape {bias.shape} against N={shape[1]}.")
