"""Finds what `--config NAME.py[:variant]` means, before ml_collections reads it; rows of studies.

ml_collections' own parser takes a missing file for an empty config, and says of a wrong variant or
field only that it is wrong; here each is a message that lists what there is.
"""

import importlib.util
import json
import re
import shlex
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, Final

import configs
from lowbit_jax.training.config import TrainConfig
from lowbit_jax.training.fields import check_field, flatten, nearest

_BOOLS: Final = {"True": "true", "False": "false"}  # as --config.PATH=True takes them


def available() -> list[str]:
    """The configs that come with the package: files of `configs/` that define `get_config`."""
    return sorted(p.name for p in _folder().glob("*.py") if "def get_config(" in p.read_text())


def find_file(name: str) -> Path:
    """`name` as a path, or else in the package's `configs/`, with or without `.py`.

    Raises: ValueError: Neither exists; the message lists the configs, nearest first.
    """
    for candidate in (Path(name), _folder() / name, _folder() / f"{name}.py"):
        if candidate.is_file():
            return candidate
    raise ValueError(
        f"no config {name!r}, neither as a path nor in {_folder()}, which has: "
        f"{', '.join(nearest(name, available()))}."
    )


def load(name: str, variant: str = "") -> Any:
    """The config of a file, for notebooks: `load("qat_ternary.py", "smoke")`.

    Raises: ValueError: No such file or variant, or the file has no `get_config`.
    """
    path = find_file(name)
    spec = importlib.util.spec_from_file_location(f"config_{path.stem}", path)
    if spec is None or spec.loader is None:
        raise ValueError(f"{path}: is not a Python file, and a config is one.")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    if not hasattr(module, "get_config"):
        raise ValueError(f"{path}: defines no get_config(variant), so it is no config.")
    return module.get_config(*([variant] if variant else []))


def resolve(argv: Sequence[str], flag: str = "config", kind: type[Any] = TrainConfig) -> list[str]:
    """`argv` with the config's path instead of its name; file, variant and fields are checked.

    Args:
        argv: The command line.
        flag: Name of the flag.
        kind: Class of the configs that the command takes.

    Raises: ValueError: One of them is wrong or of another kind, or there is no `--config` at all.
    """
    argv = list(argv)
    index, value = _find_flag(argv, flag, kind)
    name, _, variant = value.partition(":")
    config = load(name, variant)
    if not isinstance(config, kind):
        raise ValueError(
            f"--{flag}={name}: is a {type(config).__name__}, and this command takes a "
            f"{kind.__name__}: {', '.join(_of_kind(kind))}."
        )
    for arg in argv[1:]:
        if match := re.match(rf"--?(?:no)?{flag}\.([^=]+)", arg):
            _check_path(config, match[1])
    path = find_file(name)
    argv[index] = f"--{flag}={path}:{variant}" if variant else f"--{flag}={path}"
    return argv


def rows(
    cards: Sequence[str], also: Sequence[str], variant: str, changes: Sequence[str]
) -> dict[str, Any]:
    """The rows of the table: every card, then those of `also`, as the flags write them.

    Args:
        cards: Files of configs.
        also: `NAME CARD PATH=VALUE ...` each.
        variant: Of every card.
        changes: `PATH=VALUE` each, for all rows.

    Raises: ValueError: An item of another form, an unknown field, a value of another type.
    """
    found = {Path(card).stem: (card, [*changes]) for card in cards}
    for item in also:
        name, card, *fields = [*shlex.split(item), "", ""]
        if not card or name in found:
            raise ValueError(f"--also {item!r}: must start with a new NAME and a CARD.")
        found[name] = (card, [*changes, *filter(None, fields)])
    return {name: assigned(load(card, variant), fields) for name, (card, fields) in found.items()}


def assigned(config: Any, items: Iterable[str]) -> Any:
    """A config with `PATH=VALUE` set, each value read as its field's type.

    Raises: ValueError: No `=`, an unknown field, or a value of another type.
    """
    for item in items:
        path, equals, text = item.partition("=")
        if not equals:
            raise ValueError(f"{item!r} is not of the form PATH=VALUE.")
        before = flatten(config).get(path, "")  # `replace` refuses an unknown one
        try:
            value = text if isinstance(before, str) else json.loads(_BOOLS.get(text, text))
        except json.JSONDecodeError:
            value = text
        if type(value) is not type(before) and (type(before), type(value)) != (float, int):
            raise ValueError(f"{item!r}: {path} is a {type(before).__name__}, as {before!r}.")
        config = config.replace({path: value})
    return config


def _of_kind(kind: type[Any]) -> list[str]:
    """The configs that come with the package whose `get_config` makes a `kind`."""
    return [name for name in available() if isinstance(load(name), kind)]


def _find_flag(argv: list[str], flag: str, kind: type[Any]) -> tuple[int, str]:
    """Where the flag stands and its value; `--config X` is joined to one argument in place."""
    for index, arg in enumerate(argv):
        if match := re.fullmatch(rf"--?{flag}=(.*)", arg):
            return index, match[1]
        if re.fullmatch(rf"--?{flag}", arg) and index + 1 < len(argv):
            return index, argv.pop(index + 1)
    names = _of_kind(kind)
    raise ValueError(
        f"--{flag} is missing, such as --{flag} {names[-1]}; there are: {', '.join(names)}. "
        f"A variant follows after a colon: {names[-1]}:smoke."
    )


def _check_path(config: Any, path: str) -> None:
    holder = config
    for part in path.split("."):
        holder = getattr(holder, check_field(holder, part, f"--config.{path}"))


def _folder() -> Path:
    return Path(next(iter(configs.__path__)))
