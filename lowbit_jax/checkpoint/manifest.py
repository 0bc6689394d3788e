"""`manifest.json`: what a checkpoint holds, readable without jax.

{"schema": 2, "library": "lowbit_jax 0.1.0", "family": "decoder", "config": {...}, "kind": "packed",
 "recipe": {"schema": 1, "rules": [...]}, "arrays": "arrays-1",
 "tensors": {"layers/0/mlp/up/kernel": {"shape": [...], "dtype": "float32", "spec": {...},
     "layout": "planes-k-low-first", "sha256": {"words_0": "...", "scale": "..."}}},
 "tokenizer": {...}, "source_sha256": "...", "calibration_sha256": "...", "metadata": {...}}

Schema 1 had neither digests nor tokenizer, and its arrays always lay in `arrays`. Every schema that
was ever written stays readable; a golden checkpoint of each is kept in the tests.
"""

import json
import re
from typing import Any, Final

from etils import epath

SCHEMA: Final = 2
FILE: Final = "manifest.json"
LAYOUT: Final = "planes-k-low-first"  # of words: see packing.py
ARRAYS: Final = "arrays"
KINDS: Final = ("float", "train", "packed")

_KEYS_1: Final = {
    "schema", "library", "family", "config", "kind", "recipe", "tensors", "metadata",
}  # fmt: skip
_ADDED_2: Final = {
    "arrays": ARRAYS, "tokenizer": None, "source_sha256": None, "calibration_sha256": None,
}  # fmt: skip
_MOST_BYTES: Final = 2**28  # a tokenizer of 10**6 tokens takes a tenth of it
_FOLDER: Final = re.compile(rf"{ARRAYS}(-[1-9]\d{{0,8}})?")
_DIGEST: Final = re.compile(r"[0-9a-f]{64}")


def previous_of(path: epath.PathLike) -> epath.Path:
    """Where a schema 1 checkpoint lay for the moment in which another took its name."""
    path = epath.Path(path)
    return path.parent / f".{path.name}.previous"


def located(path: epath.PathLike) -> epath.Path:
    """The folder itself, or what a schema 1 writer that died had moved aside."""
    path = epath.Path(path)
    previous = previous_of(path)
    return previous if not path.exists() and previous.exists() else path


def read_manifest(path: epath.PathLike) -> dict[str, Any]:
    """The manifest of a checkpoint folder; what its schema did not know yet has its default.

    Raises:
        ValueError: The folder is no checkpoint, its manifest is damaged, or its schema or layout
            is unknown here.
    """
    file = located(path) / FILE
    if not file.exists():
        raise ValueError(
            f"{path}: no checkpoint here ({FILE} is missing). It is written last: a folder without "
            "it is none, or one whose first save was interrupted."
        )
    try:
        if (size := file.stat().length) > _MOST_BYTES:
            raise ValueError(f"{size} bytes, where {_MOST_BYTES} are the most")
        manifest = json.loads(file.read_text())
    # ValueError: no JSON, no UTF-8, a number of thousands of digits; RecursionError: nested deeply.
    except (ValueError, RecursionError) as error:
        raise ValueError(
            f"{file}: the manifest is damaged ({error}). Restore it from a copy."
        ) from None
    schema = manifest.get("schema") if isinstance(manifest, dict) else None
    if type(schema) is not int or not 1 <= schema <= SCHEMA:
        raise ValueError(
            f"{file}: schema {schema!r} is not among {list(range(1, SCHEMA + 1))}, those that this "
            "version reads. A newer lowbit_jax wrote it, or it is another program's file."
        )
    keys = _KEYS_1 | (_ADDED_2.keys() if schema > 1 else set())
    if set(manifest) != keys:
        raise ValueError(
            f"{file}: keys {sorted(set(manifest) ^ keys)} are missing or unknown in schema "
            f"{schema}."
        )
    if schema == 1:
        manifest |= _ADDED_2
    _check(file, manifest)
    return manifest


def is_sha256(value: Any) -> bool:
    """Whether a value is a digest as the manifest writes it: 64 lower-case hexadecimal digits."""
    return isinstance(value, str) and _DIGEST.fullmatch(value) is not None


def _check(file: epath.Path, manifest: dict[str, Any]) -> None:
    """Raises ValueError for a field that is not what its name says, naming it."""
    optional: dict[str, type] = {
        "family": str, "config": dict, "recipe": dict, "tokenizer": dict,
    }  # fmt: skip
    wrong = [
        key
        for key, cls in optional.items()
        if manifest[key] is not None and not isinstance(manifest[key], cls)
    ]
    wrong += [key for key in ("tensors", "metadata") if not isinstance(manifest[key], dict)]
    for key in ("source_sha256", "calibration_sha256"):
        if manifest[key] is not None and not is_sha256(manifest[key]):
            wrong.append(key)
    if (manifest["family"] is None) != (manifest["config"] is None):
        wrong.append("config")
    if manifest["kind"] not in KINDS:
        wrong.append("kind")
    # It becomes a path: nothing but what `save` would call it.
    if not (isinstance(manifest["arrays"], str) and _FOLDER.fullmatch(manifest["arrays"])):
        wrong.append("arrays")
    if wrong:
        shown = repr(manifest[wrong[0]])[:80]
        raise ValueError(
            f"{file}: the manifest is damaged ({wrong[0]} is {shown}). Restore it from a copy."
        )
    for name, entry in manifest["tensors"].items():
        _check_tensor(file, name, entry, digests=manifest["schema"] > 1)


def _check_tensor(file: epath.Path, name: str, entry: Any, *, digests: bool) -> None:
    keys = {"shape", "dtype"} | ({"sha256"} if digests else set())
    quantized = isinstance(entry, dict) and "spec" in entry
    if quantized:
        keys |= {"spec", "layout"}
        if (layout := entry.get("layout")) != LAYOUT:
            raise ValueError(
                f"{file}: {name} has the layout {layout!r}; {LAYOUT!r} is the one that this "
                "version reads. A newer lowbit_jax wrote it."
            )
    valid = isinstance(entry, dict) and set(entry) == keys
    if valid and digests:
        found = entry["sha256"]
        values = found.values() if quantized and isinstance(found, dict) else [found]
        valid = all(map(is_sha256, values))
    if not valid:
        raise ValueError(
            f"{file}: the manifest is damaged (tensor {name}: {repr(entry)[:80]}). Restore it from "
            "a copy."
        )
