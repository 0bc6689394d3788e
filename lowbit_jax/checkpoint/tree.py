"""A model's state as a tree of plain dicts and arrays, which is what lies on disk, and back."""

from typing import Any

from flax import nnx

from lowbit_jax.qtensor import QTensor

_PARTS = ("scale", "zero_point", "global_scale")


def to_tree(state: nnx.State) -> dict[str, Any]:
    """NNX state to nested dicts by string; a QTensor becomes {"words_0": .., "scale": .., ..}."""
    tree: dict[str, Any] = {}
    for path, variable in nnx.to_flat_state(state):
        node = tree
        for key in path[:-1]:
            node = node.setdefault(str(key), {})
        value = _value(variable)
        node[str(path[-1])] = _parts(value) if isinstance(value, QTensor) else value
    return tree


def from_tree(tree: dict[str, Any], abstract: nnx.State) -> nnx.State:
    """The inverse of `to_tree`, for a state of the same structure as `abstract`."""
    flat = []
    for path, variable in nnx.to_flat_state(abstract):
        node: Any = tree
        for key in path:
            node = node[str(key)]
        value = _value(variable)
        if isinstance(value, QTensor):
            node = _join(node, value)
        flat.append((path, variable.replace(node) if isinstance(variable, nnx.Variable) else node))
    return nnx.from_flat_state(flat)


def describe(state: nnx.State) -> dict[str, Any]:
    """What the manifest says of every variable: shape, dtype, and the spec of a quantized one."""
    tensors = {}
    for path, variable in nnx.to_flat_state(state):
        value = _value(variable)
        entry: dict[str, Any] = {"shape": list(value.shape), "dtype": str(value.dtype)}
        if isinstance(value, QTensor):
            entry |= {"spec": value.spec.to_dict(), "layout": "planes-k-low-first"}
        tensors["/".join(map(str, path))] = entry
    return tensors


def _value(leaf: Any) -> Any:
    """What a variable holds; a plain array among a model's attributes (a mask) is a leaf itself."""
    return leaf.get_value() if isinstance(leaf, nnx.Variable) else leaf


def _parts(q: QTensor) -> dict[str, Any]:
    parts = {f"words_{i}": plane for i, plane in enumerate(q.words)}
    return parts | {name: getattr(q, name) for name in _PARTS if getattr(q, name) is not None}


def _join(parts: dict[str, Any], like: QTensor) -> QTensor:
    words = tuple(parts[f"words_{i}"] for i in range(len(like.words)))
    rest: dict[str, Any] = {name: parts.get(name) for name in _PARTS}
    return QTensor(words=words, **rest, spec=like.spec, k=like.k, dtype=like.dtype)
