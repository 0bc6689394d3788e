"""Model families by name: a manifest keeps (family, configuration), and this makes the model again.

A family is a module class built as `cls(config, rngs=rngs)` with a frozen dataclass as its
configuration, which it keeps as `model.config`. The configuration travels as a JSON object: tuples
are written as lists and read back.
"""

import dataclasses
import difflib
import inspect
from collections.abc import Callable, Mapping
from typing import Any

from flax import nnx

_FAMILIES: dict[str, type[Any]] = {}


def register[T: type[nnx.Module]](name: str) -> Callable[[T], T]:
    """Registers the decorated class as the family `name`.

    Raises:
        ValueError: `name` is taken.
        TypeError: the class does not annotate its argument `config` with a dataclass.
    """

    def add(cls: T) -> T:
        if name in _FAMILIES and _FAMILIES[name] is not cls:
            raise ValueError(
                f"model family {name!r} is taken by {_FAMILIES[name].__qualname__}; "
                f"register {cls.__qualname__} under another name."
            )
        _config_type(cls)
        _FAMILIES[name] = cls
        return cls

    return add


def build(family: str, config: Mapping[str, Any], rngs: nnx.Rngs) -> nnx.Module:
    """Builds a model from its family's name and its configuration as a JSON object.

    Works under `nnx.eval_shape` too, for the shapes without the arrays.

    Raises: ValueError: the family is not registered, or the configuration has an unknown, a missing
        or a wrong field.
    """
    if family not in _FAMILIES:
        raise ValueError(
            f"no model family {family!r}. Registered: {sorted(_FAMILIES)}. "
            f"A family of your own has to be imported first, so that it registers itself."
        )
    cls = _FAMILIES[family]
    config_type = _config_type(cls)
    fields = {field.name: field for field in dataclasses.fields(config_type) if field.init}
    if unknown := sorted(set(config) - set(fields)):
        near = difflib.get_close_matches(unknown[0], fields, n=1)
        hint = f" Did you mean {near[0]!r}?" if near else ""
        raise ValueError(
            f"model family {family!r}: {config_type.__name__} has no fields {unknown}.{hint} "
            f"Fields: {list(fields)}."
        )
    required = [
        name
        for name, field in fields.items()
        if field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING
    ]
    if missing := [name for name in required if name not in config]:
        raise ValueError(
            f"model family {family!r}: {config_type.__name__} needs the fields {missing}, "
            f"which the configuration lacks."
        )
    return cls(
        config_type(**{name: _from_json(value) for name, value in config.items()}), rngs=rngs
    )


def family_of(model: nnx.Module) -> tuple[str, dict[str, Any]]:
    """The family's name and the configuration as a JSON object, for `build`.

    A model whose layers were swapped is still of its family.

    Raises: ValueError: the model's class is not registered.
    """
    for name, cls in _FAMILIES.items():
        if type(model) is cls:
            config = dataclasses.asdict(vars(model)["config"])
            return name, {field: _to_json(value) for field, value in config.items()}
    raise ValueError(
        f"{type(model).__qualname__} is not a registered model family. Registered: "
        f"{sorted(_FAMILIES)}. Decorate the class with register(name)."
    )


def _config_type(cls: type[Any]) -> type[Any]:
    parameters = inspect.signature(cls.__init__, eval_str=True).parameters
    annotation = parameters["config"].annotation if "config" in parameters else None
    if not (isinstance(annotation, type) and dataclasses.is_dataclass(annotation)):
        raise TypeError(
            f"{cls.__qualname__}: a model family is built as cls(config, rngs=rngs), and "
            f"annotates `config` with its dataclass; found {annotation!r}."
        )
    return annotation


def _from_json(value: Any) -> Any:
    return tuple(map(_from_json, value)) if isinstance(value, list) else value


def _to_json(value: Any) -> Any:
    return list(map(_to_json, value)) if isinstance(value, tuple) else value
