"""A model's state as a tree of plain dicts and arrays, which is what lies on disk, and back."""

from collections.abc import Iterator
from typing import Any

import jax
from flax import nnx

from lowbit_jax.checkpoint.manifest import LAYOUT
from lowbit_jax.ops import Prepared
from lowbit_jax.qtensor import QTensor

_PARTS = ("scale", "zero_point", "global_scale", "basis", "scale_offset")


def to_tree(state: nnx.State) -> dict[str, Any]:
    """NNX state to nested dicts by string; a QTensor becomes {"words_0": .., "scale": .., ..}."""
    tree: dict[str, Any] = {}
    for path, variable in nnx.to_flat_state(state):
        value = _value(variable)
        insert(tree, path, qtensor_parts(value) if isinstance(value, QTensor) else value)
    return tree


def insert(tree: dict[str, Any], path: tuple[Any, ...], value: Any) -> None:
    """Puts `value` into nested dicts at `path`."""
    for key in path[:-1]:
        tree = tree.setdefault(str(key), {})
    tree[str(path[-1])] = value


def from_tree(tree: dict[str, Any], abstract: nnx.State) -> nnx.State:
    """The inverse of `to_tree`, for a state of the same structure as `abstract`.

    Random keys may come as they are or as the numbers that `raw` made of them.
    """
    flat = []
    for path, variable in nnx.to_flat_state(abstract):
        node: Any = tree
        for key in path:
            node = node[str(key)]
        value = _value(variable)
        if isinstance(value, QTensor):
            node = _join(node, value)
        elif _is_key(value) and not _is_key(node):
            node = jax.random.wrap_key_data(node, impl=key_impl(str(value.dtype)))
        flat.append((path, variable.replace(node) if isinstance(variable, nnx.Variable) else node))
    return nnx.from_flat_state(flat)


def raw(tree: dict[str, Any]) -> dict[str, Any]:
    """The tree with random keys as uint32 arrays, which every reader of files knows."""
    return jax.tree.map(lambda x: jax.random.key_data(x) if _is_key(x) else x, tree)


def key_impl(dtype: str) -> str:
    """The name of the generator of random keys with this dtype, "key<fry>" for one.

    Raises: ValueError: It is not one of jax's.
    """
    for impl in ("threefry2x32", "rbg", "unsafe_rbg"):
        if str(jax.eval_shape(lambda impl=impl: jax.random.key(0, impl=impl)).dtype) == dtype:
            return impl
    raise ValueError(f"no generator of random keys has the dtype {dtype!r}.")


def describe(state: nnx.State) -> dict[str, Any]:
    """What the manifest says of every variable: shape, dtype, and the spec of a quantized one."""
    tensors = {}
    for path, variable in nnx.to_flat_state(state):
        value = _value(variable)
        entry: dict[str, Any] = {"shape": list(value.shape), "dtype": str(value.dtype)}
        if isinstance(value, QTensor):
            entry |= {"spec": value.spec.to_dict(), "layout": LAYOUT}
        tensors["/".join(map(str, path))] = entry
    return tensors


def parts(state: nnx.State) -> dict[tuple[str, str], Any]:
    """Every array by (path of its variable, part of a QTensor); the part of others is ""."""
    arrays: dict[tuple[str, str], Any] = {}
    for path, variable in nnx.to_flat_state(state):
        name, value = "/".join(map(str, path)), _value(variable)
        of_value = qtensor_parts(value) if isinstance(value, QTensor) else {"": value}
        arrays |= {(name, part): array for part, array in flat_parts(of_value)}
    return arrays


def _value(leaf: Any) -> Any:
    """What a variable holds; a plain array among a model's attributes (a mask) is a leaf itself."""
    value = leaf.get_value() if isinstance(leaf, nnx.Variable) else leaf
    if isinstance(value, Prepared):
        raise ValueError(
            f"a kernel was prepared for {value.meta.target!r}; what is prepared is for multiplying "
            "only, and its order may change. Save the model that lb.prepare_model was given."
        )
    return value


def _is_key(x: Any) -> bool:
    return jax.dtypes.issubdtype(x.dtype, jax.dtypes.prng_key)


def qtensor_parts(q: QTensor) -> dict[str, Any]:
    """A QTensor's arrays by name; those of scales that are quantized in a dict of their own."""
    parts: dict[str, Any] = {f"words_{i}": plane for i, plane in enumerate(q.words)}
    parts |= {name: getattr(q, name) for name in _PARTS if getattr(q, name) is not None}
    return parts | {n: qtensor_parts(p) for n, p in parts.items() if isinstance(p, QTensor)}


def flat_parts(parts: dict[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """What `qtensor_parts` made, by names such as "scale/words_0"."""
    for name, part in parts.items():
        if isinstance(part, dict):
            yield from flat_parts(part, f"{prefix}{name}/")
        else:
            yield f"{prefix}{name}", part


def _join(parts: dict[str, Any], like: QTensor) -> QTensor:
    words = tuple(parts[f"words_{i}"] for i in range(len(like.words)))
    rest: dict[str, Any] = {name: parts.get(name) for name in _PARTS}
    if isinstance(like.scale, QTensor):
        rest["scale"] = _join(rest["scale"], like.scale)
    return QTensor(words=words, **rest, spec=like.spec, k=like.k, dtype=like.dtype)
