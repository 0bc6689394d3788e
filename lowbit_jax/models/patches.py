"""A convolution as one matrix product: every window of the image becomes a row of a matrix.

    y[b, r, c] = row(x[b, r : r + kh, c : c + kw]) @ kernel seen as [kh * kw * I, O]

The matrix has kh * kw times the elements of the image. In return both gradients are matrix
products as well, where XLA on the CPU differentiates a convolution into convolutions whose
windows are as large as the image.
"""

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float


def convolve_by_patches(
    inputs: Float[Array, "batch height width _"],
    kernel: Float[Array, "kh kw _ channels"],
    strides: Sequence[int],
    padding: str | Sequence[tuple[int, int]],
    *,
    lhs_dilation: Sequence[int] | None = None,
    rhs_dilation: Sequence[int] | None = None,
    dimension_numbers: Any = None,
    feature_group_count: int = 1,
    precision: Any = None,
    preferred_element_type: Any = None,
    out_sharding: Any = None,
) -> Float[Array, "batch _ _ channels"]:
    """`lax.conv_general_dilated` for `nnx.Conv(..., conv_general_dilated=convolve_by_patches)`.

    Args:
        inputs: Images, channels last.
        kernel: Windows, as Flax has them.
        strides: Down and across, in pixels.
        padding: "SAME", "VALID" or pixels (before, after) of both axes.
        lhs_dilation: None or ones.
        rhs_dilation: None or ones.
        dimension_numbers: Not looked at: the layout is Flax's.
        feature_group_count: 1.
        precision: Of the product.
        preferred_element_type: Of the product.
        out_sharding: Of the product.
    Raises: NotImplementedError: images that are not two-dimensional, dilation, groups.
    """
    del dimension_numbers
    dilated = any(d != 1 for d in (*(lhs_dilation or ()), *(rhs_dilation or ())))
    if inputs.ndim != 4 or dilated or feature_group_count != 1:
        raise NotImplementedError(
            f"convolve_by_patches: inputs {inputs.shape}, dilations {lhs_dilation} and "
            f"{rhs_dilation}, {feature_group_count} groups: only [batch, height, width, channels] "
            "without dilation and groups. Use lax.conv_general_dilated."
        )
    kh, kw, features, channels = kernel.shape
    size = inputs.shape[1:3]
    if isinstance(padding, str):
        padding = lax.padtype_to_pads(size, (kh, kw), strides, padding)
    inputs = jnp.pad(inputs, ((0, 0), *padding, (0, 0)))
    rows, columns = (
        (length - window) // stride + 1
        for length, window, stride in zip(inputs.shape[1:3], (kh, kw), strides, strict=True)
    )

    def pixels(i: int, j: int) -> Array:
        """Pixel (i, j) of every window."""
        last = (i + (rows - 1) * strides[0] + 1, j + (columns - 1) * strides[1] + 1)
        limit = (inputs.shape[0], *last, features)
        return lax.slice(inputs, (0, i, j, 0), limit, (1, *strides, 1))

    patches = jnp.concatenate([pixels(i, j) for i in range(kh) for j in range(kw)], axis=-1)
    return jax.lax.dot_general(
        patches,
        kernel.reshape(-1, channels),
        (((3,), (0,)), ((), ())),
        precision=precision,
        preferred_element_type=preferred_element_type,
        out_sharding=out_sharding,
    )
