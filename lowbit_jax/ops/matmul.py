"""`matmul(x, qtensor)`: one operation for every format, whatever computes it."""

from typing import Final, Literal

import jax.numpy as jnp
from jaxtyping import Array, Float

from lowbit_jax.calibrate import absmax
from lowbit_jax.formats import INT8_NARROW
from lowbit_jax.grid import snap
from lowbit_jax.qtensor import QTensor
from lowbit_jax.spec import PerToken, QuantSpec

_INT8_ACTIVATIONS: Final = QuantSpec(format=INT8_NARROW, granularity=PerToken())


def matmul(
    x: Float[Array, "*batch k"],
    qtensor: QTensor,
    *,
    act: Literal["int8"] | None = None,
    implementation: Literal["xla"] | None = None,
    out_dtype: jnp.dtype | None = None,
    bias: Float[Array, "n"] | None = None,
) -> Float[Array, "*batch n"]:
    """x @ qtensor.dequantize(), in the dtype of `x`.

    Args:
        x: Activations.
        qtensor: Kernel [K, N].
        act: "int8" rounds `x` to int8 per token first (absmax / 127).
        implementation: "xla" unpacks and dequantizes inside the program; None chooses, and has
            only that so far.
        out_dtype: Of the result; default that of `x`.
        bias: Added to the product.

    Raises:
        ValueError: The lengths of K differ, or the kernel is not a matrix.
        NotImplementedError: An implementation or activation format that does not exist here.
    """
    if implementation not in (None, "xla"):
        raise NotImplementedError(
            f"matmul: implementation {implementation!r} does not exist here. Available: ['xla']."
        )
    if act not in (None, "int8"):
        raise NotImplementedError(f"matmul: act={act!r} does not exist here. Available: ['int8'].")
    if qtensor.ndim != 2 or x.ndim < 1 or x.shape[-1] != qtensor.k:
        raise ValueError(
            f"matmul: x of shape {tuple(x.shape)} against a kernel of shape {qtensor.shape}: needs "
            "a kernel [K, N] and K as the last axis of x. Map over a stack with jax.vmap."
        )
    if act == "int8":
        x = snap(x, _INT8_ACTIVATIONS, absmax(x, _INT8_ACTIVATIONS))
    w = qtensor.dequantize().astype(x.dtype)
    y = jnp.matmul(x, w, preferred_element_type=out_dtype)
    if bias is not None:
        y = y + bias.astype(y.dtype).reshape((1,) * (y.ndim - 1) + bias.shape)
    return y
