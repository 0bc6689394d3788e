"""`manifest.json`: what a checkpoint holds, readable without jax.

{"schema": 1, "library": "lowbit_jax 0.1.0", "family": "decoder", "config": {...}, "kind": "packed",
 "recipe": {"schema": 1, "rules": [...]}, "tensors": {"layers/0/mlp/up/kernel": {...}}, "metadata":
 {...}}
"""

import json
from typing import Any, Final

from etils import epath

SCHEMA: Final = 1
FILE: Final = "manifest.json"
ARRAYS: Final = "arrays"
_KEYS: Final = {"schema", "library", "family", "config", "kind", "recipe", "tensors", "metadata"}


def previous_of(path: epath.PathLike) -> epath.Path:
    """Where a checkpoint lies for the moment in which another takes its name."""
    path = epath.Path(path)
    return path.parent / f".{path.name}.previous"


def read_manifest(path: epath.PathLike) -> dict[str, Any]:
    """The manifest of a checkpoint folder.

    Raises:
        ValueError: The folder is no checkpoint, its manifest is damaged, or its schema is unknown
            here.
    """
    file = epath.Path(path) / FILE
    if not file.exists():
        previous = previous_of(path)
        hint = f" Its replacement was interrupted: rename {previous} back." * previous.exists()
        raise ValueError(f"{path}: no checkpoint here ({FILE} is missing).{hint}")
    try:
        manifest = json.loads(file.read_text())
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ValueError(
            f"{file}: the manifest is damaged ({error}). Restore it from a copy."
        ) from None
    schema = manifest.get("schema") if isinstance(manifest, dict) else None
    if schema != SCHEMA:
        raise ValueError(
            f"{file}: schema {schema!r} is not {SCHEMA}, the one this version reads. "
            "A newer lowbit_jax wrote it, or it is another program's file."
        )
    if set(manifest) != _KEYS:
        raise ValueError(
            f"{file}: keys {sorted(set(manifest) ^ _KEYS)} are missing or unknown in schema "
            f"{SCHEMA}."
        )
    return manifest
