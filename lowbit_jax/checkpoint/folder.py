"""The folder of a checkpoint, and how a new content takes the place of the old one at once.

    <path>/manifest.json    names the folder of the arrays; writing it is the commit
    <path>/arrays-3/        an orbax tree

A save writes a folder of arrays beside the one in use and then replaces the manifest, a single
file: on a disk by a rename, on an object store by one put, both of which happen or do not. No
folder is ever renamed, which an object store could not do at once. Whoever is killed leaves the old
manifest with its arrays, and a folder without a name in it, which the next save removes.
"""

import os

import jax
import numpy as np
import orbax.checkpoint as ocp
from etils import epath
from jax.experimental import multihost_utils

from lowbit_jax.checkpoint.manifest import ARRAYS, FILE, previous_of, read_manifest
from lowbit_jax.checkpoint.zarr import is_local

_PARTIAL = f".{FILE}.partial"
_TIMEOUT_MS = 600_000


def check_free(path: epath.Path, *, overwrite: bool) -> None:
    """Raises ValueError if saving to `path` would replace something that it may not."""
    if overwrite:
        return
    if (path / FILE).exists() or (not path.exists() and previous_of(path).exists()):
        raise ValueError(f"{path} exists already. Choose another path, or pass overwrite=True.")
    if path.exists() and (foreign := [p.name for p in path.iterdir() if not _is_ours(p.name)]):
        raise ValueError(
            f"{path} exists already and is no checkpoint: it holds {sorted(foreign)[:3]}. Choose "
            "another path, or pass overwrite=True to write into it; nothing there is removed."
        )


def prepare(path: epath.Path) -> str:
    """Makes the folder, removes what a killed save left, and names the folder of the new arrays."""
    number = 0
    if jax.process_index() == 0:
        previous = previous_of(path)
        if previous.exists() and not path.exists():
            previous.rename(path)  # a schema 1 writer that died while it replaced this one
        path.mkdir(parents=True, exist_ok=True)
        _remove_all_but(path, _current(path))
        taken = [p.name for p in path.iterdir() if p.name.startswith(ARRAYS)]
        number = 1 + max((_number(name) for name in taken), default=-1)
    if jax.process_count() > 1:
        number = int(multihost_utils.broadcast_one_to_all(np.int32(number)))
    return f"{ARRAYS}-{number}" if number else ARRAYS


def commit(path: epath.Path, text: str, arrays: str) -> None:
    """Writes the manifest once all processes have written, then removes what it replaced."""
    barrier(f"{path}:written")
    if jax.process_index() == 0:
        _replace(path / FILE, text)
        _remove_all_but(path, arrays)
        for left in (previous_of(path), path.parent / f".{path.name}.partial"):
            if left.exists():
                left.rmtree()
    barrier(f"{path}:committed")


def barrier(name: str) -> None:
    """Waits for all processes; may be called from a background thread."""
    ocp.multihost.get_barrier_sync_fn()(key=name, timeout_ms=_TIMEOUT_MS)


def _current(path: epath.Path) -> str | None:
    """The folder of arrays in use; None where no manifest can say it."""
    try:
        return str(read_manifest(path)["arrays"])
    except ValueError:
        return None


def _remove_all_but(path: epath.Path, kept: str | None) -> None:
    # A manifest that is there but cannot be read may be repaired, and needs its arrays then.
    if kept is None and (path / FILE).exists():
        return
    for entry in path.iterdir():
        if entry.name == _PARTIAL:
            entry.unlink()
        elif entry.name != kept and _is_ours(entry.name):
            entry.rmtree()


def _is_ours(name: str) -> bool:
    """Names that saves give, and orbax's own name for what it has not finished."""
    return name in (_PARTIAL, ARRAYS) or name.startswith((f"{ARRAYS}-", f"{ARRAYS}.orbax"))


def _number(name: str) -> int:
    tail = name.removeprefix(f"{ARRAYS}-").split(".")[0]
    return int(tail) if tail.isdecimal() else 0


def _replace(file: epath.Path, text: str) -> None:
    """Puts `text` in the place of a file at once, and on a disk survives a power cut."""
    if not is_local(file):
        file.write_text(text)  # one put, which is atomic
        return
    partial = os.fspath(file.parent / _PARTIAL)
    with open(partial, "w", encoding="utf-8") as opened:
        opened.write(text)
        opened.flush()
        os.fsync(opened.fileno())
    os.replace(partial, file)
    folder = os.open(os.fspath(file.parent), os.O_RDONLY)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)
