"""What a solver sees of a layer: its kernel as a matrix, and its inputs as rows of the same K.

| layer | rows |
|---|---|
| Linear, LinearGeneral, tied head | every token's features |
| Einsum | per stack entry (expert) every token's contracted letters |
| Conv | per group every window's patch |
"""

from collections.abc import Callable
from typing import Any, Final

import jax.numpy as jnp
from flax import nnx
from jax import lax
from jaxtyping import Array, Float

from lowbit_jax.nn import Twin
from lowbit_jax.nn.views import (
    MatrixView,
    conv_view,
    einsum_letters,
    einsum_view,
    embed_view,
    input_positions,
    linear_general_view,
    linear_view,
)

VIEWS: Final[dict[type[nnx.Module], Callable[[Any], MatrixView]]] = {
    nnx.Linear: linear_view,
    nnx.LinearGeneral: linear_general_view,
    nnx.Einsum: einsum_view,
    nnx.Conv: conv_view,
    nnx.Embed: embed_view,
}


def float_class(layer: nnx.Module) -> type[nnx.Module]:
    """The Flax class of a layer or of the layer that a twin stands for."""
    return layer.float_class if isinstance(layer, Twin) else type(layer)


def view_of(layer: nnx.Module) -> MatrixView:
    """How a layer's kernel is seen as a matrix.

    Raises:
        NotImplementedError: A class without a matrix view.
    """
    cls = float_class(layer)
    if cls not in VIEWS:
        raise NotImplementedError(
            f"a {cls.__name__} has no matrix view; those with one: "
            f"{sorted(c.__name__ for c in VIEWS)}."
        )
    return VIEWS[cls](layer)


def kernel_variable(layer: nnx.Module) -> nnx.Variable[Any]:
    """The variable that holds a layer's kernel, whatever its name."""
    name = "embedding" if float_class(layer) is nnx.Embed else "kernel"
    return getattr(layer, name)


def get_matrix(layer: nnx.Module) -> Float[Array, "*stack k n"]:
    """A layer's kernel as a matrix [stack.., K, N]."""
    return view_of(layer).to_matrix(kernel_variable(layer)[...])


def set_matrix(layer: nnx.Module, matrix: Float[Array, "*stack k n"]) -> None:
    """Gives a layer another kernel, from its matrix."""
    variable = kernel_variable(layer)
    variable[...] = view_of(layer).from_matrix(matrix).astype(variable[...].dtype)


def input_rows(layer: nnx.Module, x: Array) -> Float[Array, "*stack tokens k"]:
    """A layer's input as rows that its matrix multiplies, in float32.

    Raises:
        NotImplementedError: A LinearGeneral with batch axes.
    """
    cls, x = float_class(layer), x.astype(jnp.float32)
    matrix = view_of(layer).matrix_shape
    if cls is nnx.Einsum:
        return _einsum_rows(layer, x)
    if cls is nnx.Conv:
        return _patches(layer, x)
    if cls is nnx.LinearGeneral:
        if len(matrix) > 2:
            raise NotImplementedError(
                "LinearGeneral with batch axes: its inputs are not collected; use nnx.Einsum."
            )
        axes = sorted(axis % x.ndim for axis in layer.axis)  # type: ignore[attr-defined]
        x = x.transpose(*(axis for axis in range(x.ndim) if axis not in axes), *axes)
    return x.reshape(-1, matrix[-2])


def _einsum_rows(layer: Any, x: Array) -> Array:
    letters, kernel, output = einsum_letters(layer.einsum_str)
    positions = input_positions(layer.einsum_str, x.ndim)
    stack = [positions[c] for c in kernel if c in letters and c in output]
    contracted = [positions[c] for c in kernel if c in letters and c not in output]
    rest = [axis for axis in range(x.ndim) if axis not in (*stack, *contracted)]
    lead = [x.shape[axis] for axis in stack]
    k = view_of(layer).matrix_shape[-2]
    return x.transpose(*stack, *rest, *contracted).reshape(*lead, -1, k)


def _patches(layer: Any, x: Array) -> Array:
    """Windows of a convolution as rows, channels innermost, as its matrix view merges them."""
    window, rank = layer.kernel_size, len(layer.kernel_size)
    x = x.reshape(-1, *x.shape[-rank - 1 :])
    padding = _padding(layer.padding, rank)
    spatial = "DHW"[-rank:]
    dims = lax.conv_dimension_numbers(
        x.shape, (*window, 1, 1), (f"N{spatial}C", f"{spatial}IO", f"N{spatial}C")
    )
    patches = lax.conv_general_dilated_patches(
        x,
        window,
        _per_axis(layer.strides, rank),
        padding,
        lhs_dilation=_per_axis(layer.input_dilation, rank),
        rhs_dilation=_per_axis(layer.kernel_dilation, rank),
        dimension_numbers=dims,
    )
    channels, groups = x.shape[-1], layer.feature_group_count
    # The patches' features are [channel, window..]; the matrix wants [group, (window.., channel)].
    split = patches.reshape(-1, groups, channels // groups, *window)
    order = (1, 0, *range(3, 3 + rank), 2)
    rows = split.transpose(order).reshape(groups, split.shape[0], -1)
    return rows if len(view_of(layer).matrix_shape) > 2 else rows[0]


def _per_axis(value: int | tuple[int, ...] | None, rank: int) -> tuple[int, ...]:
    if value is None:
        return (1,) * rank
    return (value,) * rank if isinstance(value, int) else tuple(value)


def _padding(value: Any, rank: int) -> str | list[tuple[int, int]]:
    if value in ("SAME", "VALID"):
        return value
    if isinstance(value, int):
        return [(value, value)] * rank
    if isinstance(value, str):
        raise NotImplementedError(
            f"Conv with padding={value!r}: its patches are not made; use 'SAME', 'VALID' or "
            "numbers."
        )
    return [(p, p) if isinstance(p, int) else tuple(p) for p in value]
