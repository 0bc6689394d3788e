"""Which axis of which parameter is cut over which axis of the mesh.

The mesh has the axes "data" (the batch), "fsdp" (the batch, and parameters cut for storage) and
"tensor" (parameters cut for computing). A kernel [..., K, N] keeps its inputs K on "fsdp" and its
outputs N on "tensor"; one that writes into the residual stream has them the other way round, so
that between the two halves of a block no activation has to be gathered. A rule names the last two
axes; those before them (stacked layers, experts, windows of a convolution) stay whole.

What belongs to a kernel (`kernel_scale`, `kernel_zero_point`, the parts of a packed kernel) has a
kernel's rank and is cut like it, but for axes of length 1. No model reads this table: it is for
whoever places parameters on a mesh.
"""

import re
from collections.abc import Mapping
from typing import Any, Final

import jax
from jax.sharding import Mesh, NamedSharding, PartitionSpec

_SECOND: Final = r"kernel(_second|/(.*/)?scale(_offset|/(words|scale)))"

# (end of the path, how the last axes are cut); the first match wins; without one: replicated.
RULES: tuple[tuple[str, PartitionSpec], ...] = (
    (r"embed/embedding", PartitionSpec("tensor", "fsdp")),
    # Scales that are quantized in their turn are transposed.
    (rf"(out|down)(/linear)?/{_SECOND}", PartitionSpec("fsdp", "tensor")),
    (_SECOND, PartitionSpec("tensor", "fsdp")),
    (r"(out|down)(/linear)?/kernel", PartitionSpec("tensor", "fsdp")),
    (r"kernel", PartitionSpec("fsdp", "tensor")),
    (r"(query|key|value|gate|up|head)/bias", PartitionSpec("tensor")),
)


def param_spec(
    path: str, shape: tuple[int, ...], axis_sizes: Mapping[str, int] | None = None
) -> PartitionSpec:
    """How the array at `path` is cut.

    An axis of length 1 is never cut. Neither is one that its part of the mesh does not divide: that
    costs memory, and changes no result.

    Args:
        path: Names joined by "/", as in "layers/0/mlp/up/kernel"; may have a prefix, as in an
            optimizer's state.
        shape: Of the whole array.
        axis_sizes: `mesh.shape`; None: the rule itself, as if every axis were there and divided.
    Returns: A specification with one entry per axis of the array.
    Example:
        >>> tuple(param_spec("layers/0/mlp/up/kernel", (256, 1024)))
        ('fsdp', 'tensor')
        >>> tuple(param_spec("layers/0/mlp/up/kernel_scale", (1, 1024)))
        (None, 'tensor')
    """
    rule = next(
        (tuple(spec) for end, spec in RULES if re.fullmatch(rf"(.*/)?{end}([_/].*)?", path)), ()
    )
    axes = (None,) * (len(shape) - len(rule)) + rule[max(0, len(rule) - len(shape)) :]

    def cut(axis: str | None, length: int) -> str | None:
        if axis is None or length == 1:
            return None
        if axis_sizes is not None and (axis not in axis_sizes or length % axis_sizes[axis]):
            return None
        return axis

    return PartitionSpec(*map(cut, axes, shape))


def param_shardings(tree: Any, mesh: Mesh) -> Any:
    """The sharding of each array in `tree`, for `jax.device_put`, `in_shardings` or a restore.

    Args:
        tree: Any pytree of arrays or of their shapes: a model, its state, an optimizer's state.
        mesh: Its axes "fsdp" and "tensor" are used, those that it has.
    Returns: A pytree like `tree` of `NamedSharding`.
    """

    def one(path: tuple[Any, ...], leaf: Any) -> NamedSharding:
        name = jax.tree_util.keystr(path, simple=True, separator="/")
        return NamedSharding(mesh, param_spec(name, leaf.shape, mesh.shape))

    return jax.tree_util.tree_map_with_path(one, tree)
