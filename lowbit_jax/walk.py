"""Walking a model: its modules with their paths, and a clone in which some are replaced.

A path is the names from the root joined by "/", such as `layers/0/mlp/up`. Modules in plain
containers (`nnx.data` of a dict, list or tuple) count: Flax's own walks pass over them.
"""

from collections.abc import Callable, Iterator
from typing import Any, Final

from flax import nnx

_PLAIN: Final = (dict, list, tuple)
_NUMBERED: Final = (nnx.List, nnx.Dict)  # their keys may be numbers


def layers(model: nnx.Module) -> Iterator[tuple[str, nnx.Module]]:
    """Every module with its path, such as `layers/0/mlp/up`; a shared one comes once."""
    yield from _walk(model, (), set())


def _walk(node: Any, path: tuple[str, ...], seen: set[int]) -> Iterator[tuple[str, Any]]:
    if id(node) in seen:
        return
    seen.add(id(node))
    if not isinstance(node, _PLAIN):
        yield "/".join(path), node
    for key, child in _children(node):
        yield from _walk(child, (*path, str(key)), seen)


def _children(node: Any) -> Iterator[tuple[Any, Any]]:
    """Modules directly inside a node, and plain containers (`nnx.data`), which Flax passes over."""
    if isinstance(node, _PLAIN):
        for key, value in node.items() if isinstance(node, dict) else enumerate(node):
            if isinstance(value, (nnx.Pytree, *_PLAIN)) and not isinstance(value, nnx.Variable):
                yield key, value
        return
    if isinstance(node, nnx.Pytree) and not isinstance(node, _NUMBERED):
        # What nnx.iter_children yields, which asks of every attribute whether it is a reference to
        # an array: half of the time that a walk takes.
        for key, value in sorted(vars(node).items()):
            if isinstance(value, nnx.Pytree) and not isinstance(value, nnx.Variable):
                yield key, value
    else:
        for key, value in nnx.iter_children(node):
            if not isinstance(value, nnx.Variable):
                yield key, value
    for key, value in vars(node).items():
        if isinstance(value, _PLAIN):
            yield key, value


def rebuilt(model: nnx.Module, replace: Callable[[str, Any], Any]) -> nnx.Module:
    """A clone (own variables, same arrays), `replace` applied to all modules, children first."""
    done: dict[int, Any] = {}

    def visit(node: Any, path: tuple[str, ...]) -> Any:
        if id(node) in done:
            return done[id(node)]
        done[id(node)] = node  # a cycle finds the node itself
        changed = {}
        for key, child in list(_children(node)):
            new = visit(child, (*path, str(key)))
            if new is not child:
                changed[key] = new
        if isinstance(node, _PLAIN):
            done[id(node)] = _with_items(node, changed)
        else:
            for key, value in changed.items():
                _assign(node, key, value)
            done[id(node)] = replace("/".join(path), node)
        return done[id(node)]

    return visit(nnx.clone(model), ())


def _with_items(node: Any, changed: dict[Any, Any]) -> Any:
    """A plain container with some items replaced."""
    if not changed:
        return node
    if isinstance(node, dict):
        return type(node)({**node, **changed})
    items = [changed.get(i, item) for i, item in enumerate(node)]
    return type(node)(*items) if hasattr(node, "_fields") else type(node)(items)


def _assign(node: Any, key: Any, value: Any) -> None:
    if isinstance(node, nnx.List | nnx.Dict) or isinstance(key, int):
        node[key] = value
    else:
        setattr(node, key, nnx.data(value) if isinstance(value, _PLAIN) else value)
