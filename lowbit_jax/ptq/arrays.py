"""Trees of arrays in a folder, each whole or not there."""

import shutil
from pathlib import Path
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp


def write_tree(path: Path, tree: dict[str, Any]) -> None:
    """Writes nested dicts of arrays to a folder, in the place of what is there."""
    partial = path.parent / f".{path.name}.partial"
    for left in (partial, path):
        if left.exists():
            shutil.rmtree(left)
    partial.parent.mkdir(parents=True, exist_ok=True)
    with ocp.PyTreeCheckpointer() as writer:
        writer.save(partial.resolve(), tree)
    partial.rename(path)


def read_tree(path: Path) -> dict[str, Any]:
    """What `write_tree` wrote, as NumPy arrays.

    Raises:
        ValueError: It cannot be read.
    """
    try:
        with ocp.PyTreeCheckpointer() as reader:
            saved = reader.metadata(path.resolve()).item_metadata.tree
            host = jax.tree.map(lambda _: ocp.RestoreArgs(restore_type=np.ndarray), saved)
            return reader.restore(path.resolve(), args=ocp.args.PyTreeRestore(restore_args=host))
    except Exception as error:  # orbax raises the bare class for a chunk that cannot be decoded
        raise ValueError(
            f"{path}: the saved state cannot be read ({str(error) or type(error).__name__}). "
            "Remove the workdir and start anew."
        ) from error
