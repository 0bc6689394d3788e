"""Scales and shifts moved from the inputs of layers into whatever makes these inputs.

If the inputs x of some layers come from a source (a norm's scale and bias, or a linear layer's
columns), then x' = (x - z) / s can be made there, and W x = (s W) x' + W z restores the product:
rows of the kernels are multiplied by s, and W z joins their biases. Nothing is left to compute at
inference.
"""

from typing import Any, Literal

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from lowbit_jax.models.rotation import Rotated
from lowbit_jax.models.wiring import Link, Wiring
from lowbit_jax.ptq.layers import float_class, get_matrix, set_matrix, view_of
from lowbit_jax.ptq.stage import BlockWork
from lowbit_jax.surgery import NORMS
from lowbit_jax.walk import layers

Which = Literal["norms", "all"]


def require_wiring(who: str, wiring: Wiring | None) -> Wiring:
    """The wiring, or a ValueError that says where to give it."""
    if wiring is None:
        raise ValueError(
            f"{who}: this model does not say which layer feeds which. Pass its table: "
            "ptq.run(..., wiring=Wiring(links=(Link('norm', ('query', 'key', 'value')), ...)))."
        )
    return wiring


def check_which(who: str, which: str) -> None:
    """Raises ValueError for an unknown choice of links."""
    if which not in ("norms", "all"):
        raise ValueError(f"{who}: links={which!r} is not of ['norms', 'all'].")


def links_of(work: BlockWork, who: str, which: Which) -> list[Link]:
    """The links of a block through which scales can go: "all", or only those behind "norms".

    A link to a layer behind an online rotation is none any more, and one whose targets are all left
    float is of no use.

    Raises:
        ValueError: No wiring, or one that names a layer that the block has not.
    """
    wiring, modules = require_wiring(who, work.wiring), dict(layers(work.original))
    found = []
    for link in wiring.links:
        for path in (link.source, *link.targets):
            if path not in modules:
                raise ValueError(
                    f"{who}: the wiring names {path!r}, which {work.name} has not. It has: "
                    f"{sorted(path for path in modules if path)}."
                )
        if which == "norms" and not isinstance(modules[link.source], NORMS):
            continue
        rotated = any(isinstance(modules[path], Rotated) for path in link.targets)
        quantized = any(path in work.schemes for path in link.targets)
        if quantized and not rotated:
            found.append(link)
    return found


def to_target(values: Float[Array, " source"], link: Link) -> Float[Array, " target"]:
    """A vector over the source's features as one over the targets' inputs."""
    if link.repeats == 1:
        return values
    group = _group(link)
    groups = values.reshape(-1, 1, group)
    return jnp.broadcast_to(groups, (groups.shape[0], link.repeats, group)).reshape(-1)


def to_source(
    values: Float[Array, " target"], link: Link, how: Literal["max", "min", "mean"]
) -> Float[Array, " source"]:
    """A vector over the targets' inputs as one over the source's features, repeats merged."""
    if link.repeats == 1:
        return values
    groups = values.reshape(-1, link.repeats, _group(link))
    return getattr(jnp, how)(groups, axis=1).reshape(-1)


def _group(link: Link) -> int:
    if link.group is None:
        raise ValueError(f"{link}: repeats={link.repeats} needs `group`, the width of one group.")
    return link.group


def rows_of(values: Float[Array, " k"], layer: nnx.Module) -> Float[Array, "..."]:
    """A vector over a layer's input features, shaped to multiply the rows of its matrix.

    A convolution's rows are its window's positions times the channels: each gets its channel's.

    Raises:
        NotImplementedError: A grouped convolution.
    """
    *stack, k, _ = view_of(layer).matrix_shape
    if float_class(layer) is nnx.Conv:
        if stack:
            raise NotImplementedError("a grouped convolution has no single row per channel.")
        values = jnp.tile(values, k // values.shape[0])
    return values.reshape(*(1 for _ in stack), k, 1)


def row_magnitudes(layer: nnx.Module) -> Float[Array, " k"]:
    """The largest magnitude of each row of a layer's matrix, over outputs and stack."""
    matrix = jnp.abs(get_matrix(layer).astype(jnp.float32))
    rows = jnp.max(
        matrix, axis=tuple(axis for axis in range(matrix.ndim) if axis != matrix.ndim - 2)
    )
    if float_class(layer) is nnx.Conv:
        rows = jnp.max(rows.reshape(-1, view_of(layer).kernel_shape[-2]), axis=0)
    return rows


def column_magnitudes(layer: nnx.Module) -> Float[Array, " n"]:
    """The largest magnitude of each column of a layer's matrix."""
    matrix = jnp.abs(get_matrix(layer).astype(jnp.float32))
    return jnp.max(matrix, axis=tuple(range(matrix.ndim - 1)))


def fold_scale(
    block: nnx.Module, link: Link, scale: Float[Array, " source"], *, targets: bool = True
) -> None:
    """Divides what a link carries by a scale, in place; its function stays.

    Args:
        block: A clone: its variables are assigned.
        link: Of this block.
        scale: Positive, over the source's features.
        targets: Whether the targets' kernels are multiplied, too.
    """
    modules = dict(layers(block))
    divide_outputs(modules[link.source], link.source, scale)
    if targets:
        rows = to_target(scale, link)
        for path in link.targets:
            multiply_inputs(modules[path], rows)


def divide_outputs(source: Any, path: str, scale: Float[Array, " n"]) -> None:
    """Divides the outputs of a norm or linear layer by a scale, in place.

    Raises:
        NotImplementedError: A norm without a scale, or a layer with a stack of kernels.
    """
    if isinstance(source, NORMS):
        if source.scale is None:
            raise NotImplementedError(
                f"{path}: this norm has no scale to fold another into. Build it with "
                "use_scale=True."
            )
        _assign(source.scale, source.scale[...] / scale)
    else:
        matrix = get_matrix(source)
        if matrix.ndim > 2:
            raise NotImplementedError(
                f"{path}: its kernel is a stack of matrices {matrix.shape}; a scale is folded into "
                "the columns of one."
            )
        set_matrix(source, matrix / scale[None, :])
    if getattr(source, "bias", None) is not None:
        _assign(source.bias, source.bias[...].reshape(-1) / scale)


def multiply_inputs(layer: nnx.Module, scale: Float[Array, " k"]) -> None:
    """Multiplies the rows of a layer's kernel by a scale, in place."""
    set_matrix(layer, get_matrix(layer) * rows_of(scale, layer))


def shift_refusal(modules: dict[str, Any], link: Link) -> str | None:
    """Why a shift cannot go through a link; None if it can."""
    if not link.linear:
        return "what it carries is multiplied by something else on its way"
    for path in (link.source, *link.targets):
        layer: Any = modules[path]
        if isinstance(layer, nnx.RMSNorm):
            return f"{path} is an RMSNorm, which has no bias to take the shift"
        if not isinstance(layer, (nnx.Linear, *NORMS)):
            return f"{path} is a {type(layer).__name__}, to which no bias is added"
        if not isinstance(layer, nnx.Linear) and getattr(layer, "bias", None) is None:
            return f"{path} was built with use_bias=False"
    return None


def fold_shift(block: nnx.Module, link: Link, shift: Float[Array, " source"]) -> None:
    """Subtracts a shift from what a link carries and adds it back behind the kernels, in place.

    Linear layers without a bias get one. Call `shift_refusal` first.
    """
    modules = dict(layers(block))
    _add_bias(modules[link.source], -shift)
    rows = to_target(shift, link)
    for path in link.targets:
        kernel = get_matrix(modules[path]).astype(jnp.float32)
        _add_bias(modules[path], jnp.dot(rows, kernel, precision=jax.lax.Precision.HIGHEST))


def _add_bias(layer: Any, values: Float[Array, " n"]) -> None:
    set_bias(layer, values if layer.bias is None else layer.bias[...].reshape(-1) + values)


def set_bias(layer: Any, values: Float[Array, " n"]) -> None:
    """Gives a layer this bias, in place; one that was built without gets a parameter."""
    if layer.bias is None:
        layer.bias = nnx.Param(values.astype(layer.param_dtype))
        layer.use_bias = True
    else:
        _assign(layer.bias, values)


def _assign(variable: nnx.Variable[Any], value: Array) -> None:
    variable[...] = value.reshape(variable[...].shape).astype(variable[...].dtype)


def positive(scale: Float[Array, "*n"], *ingredients: Array) -> Float[Array, "*n"]:
    """A scale, 1 where one of its ingredients is zero or where it is not finite and positive."""
    usable = jnp.isfinite(scale) & (scale > 0)
    for part in ingredients:
        usable &= part > 0
    return jnp.where(usable, scale, 1.0)
