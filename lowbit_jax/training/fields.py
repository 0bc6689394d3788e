"""Configs of every kind as data: mutable dataclasses of plain values, nested at will.

A field has a dotted path, such as `optim.lr`: what a command line sets and a message names.
"""

import dataclasses
import difflib
from typing import Any


def nearest(name: str, candidates: list[str]) -> list[str]:
    """`candidates`, the likeliest to be meant by `name` first."""
    return sorted(
        candidates, key=lambda c: difflib.SequenceMatcher(None, name, c).ratio(), reverse=True
    )


def at_variant(
    config: Any, name: str, table: dict[str, dict[str, Any]], variants: dict[str, dict[str, Any]]
) -> Any:
    """A config at another size, named `<name>_<variant>`; "" is the config itself.

    Args:
        config: With a field `name`.
        name: Of the variant.
        table: What the variants of this kind of config change, by dotted path.
        variants: What this config adds to them, or new ones.

    Raises: ValueError: No such variant; the message lists them, the nearest first.
    """
    if not name:
        return config
    known = {key: table.get(key, {}) for key in (*table, *variants)}
    if name not in known:
        raise ValueError(
            f"{config.name} has no variant {name!r}; it has: "
            f"{', '.join(nearest(name, sorted(known)))} (and none, for the laptop)."
        )
    changed = replaced(config, {**known[name], **variants.get(name, {})})
    changed.name = f"{config.name}_{name}"
    return changed


def check_field(holder: Any, field: str, path: str = "") -> str:
    """`field`, if the dataclass `holder` has it; else a ValueError that lists what it has."""
    if not dataclasses.is_dataclass(holder):
        raise ValueError(f"{path or field}: a {type(holder).__name__} has no field {field!r}.")
    names = [f.name for f in dataclasses.fields(holder)]
    if field not in names:
        raise ValueError(
            f"{path or field}: {type(holder).__name__} has no field {field!r}; "
            f"it has: {', '.join(nearest(field, names))}."
        )
    return field


def replaced(config: Any, changes: dict[str, Any]) -> Any:
    """A copy of a config of any kind with the fields of dotted path set."""
    copy = from_dict(to_dict(config), type(config))
    for path, value in changes.items():
        *parents, last = path.split(".")
        holder = copy
        for part in parents:
            holder = getattr(holder, check_field(holder, part, path))
        setattr(holder, check_field(holder, last, path), value)
    return copy


def to_dict(config: Any) -> dict[str, Any]:
    """A config of any kind as nested plain values, for JSON."""
    return dataclasses.asdict(config)


def from_dict(values: dict[str, Any], cls: type) -> Any:
    """The config of class `cls` that `to_dict` described; an unknown field is an error.

    Raises: ValueError: A field that there is not; the message lists those there are.
    """
    return _build(cls, values, "")


def _build(cls: type, values: dict[str, Any], prefix: str) -> Any:
    result = cls()
    for name, value in values.items():
        check_field(result, name, prefix + name)
        nested = isinstance(value, dict)
        setattr(
            result,
            name,
            _build(type(getattr(result, name)), value, f"{prefix}{name}.") if nested else value,
        )
    return result


def flatten(config: Any) -> dict[str, Any]:
    """Dotted path -> value."""
    flat: dict[str, Any] = {}

    def visit(prefix: str, values: dict[str, Any]) -> None:
        for name, value in values.items():
            if isinstance(value, dict):
                visit(f"{prefix}{name}.", value)
            else:
                flat[prefix + name] = value

    visit("", to_dict(config))
    return flat


def differences(old: Any, new: Any) -> list[str]:
    """The fields in which two configs differ, as `path: old -> new`."""
    was, now = flatten(old), flatten(new)
    return [f"{path}: {was[path]!r} -> {now[path]!r}" for path in now if was[path] != now[path]]
