"""Training checkpoints: everything a step changes, so that a resumed run is bit for bit the same.

`<workdir>/checkpoints/<step>/` is written by orbax: first to a temporary name, renamed when whole.
A directory that carries its commit mark is therefore complete; a kill in the middle leaves the
earlier ones. The position in the data is the step itself. Saving is synchronous: the step's
donated buffers stay free of bookkeeping, and an error belongs to the step that it is reported at.
"""

import json
import zlib
from pathlib import Path
from typing import Any

import jax
import orbax.checkpoint as ocp

from lowbit_jax.training.errors import CheckpointError, DiskFull, is_disk_full

KEEP = 2
_LISTING = "files.json"


class Checkpoints:
    """The checkpoints of one run, the last `KEEP` of them; a context manager."""

    def __init__(self, workdir: Path):
        self.directory = (workdir / "checkpoints").absolute()
        self._manager = ocp.CheckpointManager(
            self.directory,
            options=ocp.CheckpointManagerOptions(
                max_to_keep=KEEP,
                enable_async_checkpointing=False,
                cleanup_tmp_directories=True,
                save_root_metadata=False,
            ),
        )

    def __enter__(self) -> "Checkpoints":
        return self

    def __exit__(self, *_: object) -> None:
        self._manager.close()

    def steps(self) -> list[int]:
        """The steps that have a committed checkpoint, ascending."""
        return sorted(self._manager.all_steps())

    def save(self, step: int, state: Any, meta: dict[str, Any]) -> None:
        """Writes `state` (a pytree of arrays) and `meta` (JSON), unless `step` is there already.

        Raises: DiskFull: No space left; the earlier checkpoints are intact.
        """
        if step in self.steps():
            return
        meta = {**meta, "arrays": _shapes(state)}
        try:
            self._manager.save(
                step,
                args=ocp.args.Composite(
                    state=ocp.args.StandardSave(flat(state)), meta=ocp.args.JsonSave(meta)
                ),
                force=True,
            )
            self._manager.wait_until_finished()
            if jax.process_index() == 0:
                _write_listing(self.directory / str(step))
        except Exception as error:
            if not is_disk_full(error):
                raise
            kept = f"The checkpoints of steps {self.steps()} are intact. " if self.steps() else ""
            raise DiskFull(f"the checkpoint of step {step}", self.directory, kept) from error

    def restore(self, state: Any) -> tuple[int, Any, dict[str, Any]]:
        """The newest checkpoint as `(step, state, meta)`, placed as `state` is.

        Raises: CheckpointError: It cannot be read, or holds another model; the message names the
            file and any older checkpoint that is whole. An older one is never taken on its own.
        """
        step = self.steps()[-1]
        folder = self.directory / str(step)
        try:
            if damaged := _damaged_files(folder):
                raise CheckpointError(self._advice(step, "; ".join(damaged[:3])))
            meta = json.loads((folder / "meta" / "metadata").read_text())
            self._check_arrays(step, meta.pop("arrays"), _shapes(state))
            restored = self._manager.restore(
                step,
                args=ocp.args.Composite(
                    state=ocp.args.StandardRestore(jax.tree.map(_abstract, flat(state)))
                ),
            )
        except CheckpointError:
            raise
        except Exception as error:  # orbax and tensorstore raise many types for a foreign folder
            reason = (str(error).strip() or type(error).__name__).splitlines()[0][:300]
            raise CheckpointError(self._advice(step, reason)) from error
        leaves = [restored.state[key] for key in flat(state)]
        return step, jax.tree.unflatten(jax.tree.structure(state), leaves), meta

    def _check_arrays(self, step: int, found: dict[str, Any], expected: dict[str, Any]) -> None:
        odd = sorted(
            key for key in found.keys() | expected.keys() if found.get(key) != expected.get(key)
        )
        if odd:
            shown = "; ".join(
                f"{key} is {found.get(key, 'absent')} instead of {expected.get(key, 'absent')}"
                for key in odd[:3]
            )
            reason = f"it holds another model ({len(odd)} arrays differ: {shown})"
            raise CheckpointError(self._advice(step, reason))

    def _advice(self, step: int, reason: str) -> str:
        older = [s for s in self.steps() if s < step]
        go_on = (
            f"The checkpoint of step {older[-1]} is older and not touched: to go on from it, move "
            f"{self.directory / str(step)} away and run the same command again."
            if older
            else "There is no older one: --overwrite starts anew and keeps this as a backup."
        )
        return f"{self.directory / str(step)}: cannot be read: {reason}. {go_on}"


def flat(tree: Any) -> dict[str, Any]:
    """Leaves by their path, such as `params.layers.0.mlp.up.kernel.value`."""
    leaves = jax.tree_util.tree_flatten_with_path(tree)[0]
    return {jax.tree_util.keystr(path, simple=True, separator="."): leaf for path, leaf in leaves}


def _abstract(leaf: jax.Array) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=leaf.sharding)


def _shapes(tree: Any) -> dict[str, str]:
    return {key: f"{leaf.dtype}{list(leaf.shape)}" for key, leaf in flat(tree).items()}


def _write_listing(folder: Path) -> None:
    """Size and CRC-32 of every file, added once orbax has committed the folder."""
    listing = {}
    for path in sorted(p for p in folder.rglob("*") if p.is_file()):
        content = path.read_bytes()
        listing[path.relative_to(folder).as_posix()] = [len(content), zlib.crc32(content)]
    temporary = folder / f"{_LISTING}.tmp"
    temporary.write_text(json.dumps(listing))
    temporary.replace(folder / _LISTING)


def _damaged_files(folder: Path) -> list[str]:
    """What differs from the listing; nothing where a kill came between the commit and the listing.

    Checked before orbax opens anything: its reader takes flipped bits for numbers.
    """
    if not (folder / _LISTING).exists():
        return []
    damaged = []
    for name, (size, crc) in json.loads((folder / _LISTING).read_text()).items():
        path = folder / name
        if not path.exists():
            damaged.append(f"{name} is missing")
        elif (found := path.stat().st_size) != size:
            damaged.append(f"{name} has {found} bytes instead of {size}")
        elif zlib.crc32(path.read_bytes()) != crc:
            damaged.append(f"the content of {name} has changed (its CRC-32 differs)")
    return damaged
