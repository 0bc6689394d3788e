"""Finding a model: a run's folder, its `packed/`, or any folder that `lb.checkpoint.save` wrote."""

import dataclasses
import json
from pathlib import Path
from typing import Any

import lowbit_jax as lb
from lowbit_jax.checkpoint.manifest import FILE as MANIFEST
from lowbit_jax.data import Tokenizer, tokenizer_from_json


@dataclasses.dataclass(frozen=True)
class Loaded:
    """A model from disk; `metadata` is what was saved beside it, {} if nothing was."""

    path: Path
    model: Any
    metadata: dict[str, Any]

    def tokenizer(self) -> Tokenizer:
        """The tokenizer it was trained with. Raises: ValueError: The checkpoint does not say."""
        if "tokenizer" not in self.metadata:
            raise ValueError(
                f"{self.path}: its manifest has no tokenizer, so text cannot be read. Save it "
                "with tokenizer=tokenizer.to_json()."
            )
        return tokenizer_from_json(self.metadata["tokenizer"])


def load_checkpoint(path: str | Path, *, prepare: bool = False) -> Loaded:
    """Loads the model at `path`.

    Args:
        path: See `find_checkpoint`.
        prepare: Whether a packed model is prepared for this machine: for use, not for saving.

    Raises: ValueError: No checkpoint there; the message says what is.
    """
    folder = find_checkpoint(Path(path))
    manifest = lb.checkpoint.read_manifest(folder)
    metadata = dict(manifest.get("metadata") or {})  # where schema 1 had the tokenizer
    if manifest["tokenizer"] is not None:
        metadata["tokenizer"] = manifest["tokenizer"]
    model = lb.checkpoint.load(folder, verify=manifest["schema"] > 1)
    if prepare and manifest["kind"] == "packed":
        model = lb.prepare_model(model)
    return Loaded(folder, model, metadata)


def find_checkpoint(path: Path) -> Path:
    """The folder with the manifest: `path` itself, or the `packed/` of the run that `path` is."""
    for folder in (path, path / "packed"):
        if (folder / MANIFEST).is_file():
            return folder
    if not path.exists():
        raise ValueError(
            f"{path}: there is no such folder. A checkpoint is a run's folder or its packed/."
        )
    if (path / "config.json").exists():
        raise ValueError(
            f"{path}: this run is not finished: it has no packed/ yet. Run its command again to "
            "the end."
        )
    raise ValueError(f"{path}: holds no checkpoint: neither {MANIFEST} nor packed/{MANIFEST}.")


def read_summary(run: Path) -> dict[str, Any]:
    """summary.json of a finished run. Raises: ValueError: It is not one."""
    path = run / "summary.json"
    if not path.is_file():
        state = "is not finished" if (run / "config.json").exists() else "is not a run's folder"
        raise ValueError(f"{run}: {state}: it has no summary.json.")
    try:
        summary: dict[str, Any] = json.loads(path.read_text())
    except json.JSONDecodeError as error:
        raise ValueError(f"{path}: is not JSON ({error}).") from error
    return summary
