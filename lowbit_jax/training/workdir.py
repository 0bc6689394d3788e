"""A run's folder: whose it is, and in which state.

`config.json` is written first and `summary.json` last, so what a folder holds tells how far its
run came.
"""

import json
import os
from pathlib import Path
from typing import Any

from lowbit_jax.training.config import TrainConfig
from lowbit_jax.training.errors import DiskFull, is_disk_full
from lowbit_jax.training.fields import differences, from_dict, to_dict


def inspect(config: Any, workdir: Path, *, overwrite: bool = False) -> bool:
    """Whether `workdir` holds an unfinished run of `config`, to be resumed; changes nothing.

    `config` is a `TrainConfig` or another config dataclass; a folder of another kind is refused.

    Raises: ValueError: The folder holds a finished run, another config's, or something that is no
        run.
    """
    if not workdir.exists() or (workdir.is_dir() and not any(workdir.iterdir())):
        return False
    if not (workdir / "config.json").is_file():
        raise ValueError(
            f"{workdir}: exists and holds no run (no config.json), so it is left alone. "
            "Choose another --workdir or empty it."
        )
    if overwrite:
        return False
    changed = differences(read_config(workdir, type(config)), config)
    finished = (workdir / "summary.json").exists()
    if changed:
        raise ValueError(
            f"{workdir}: belongs to {'a finished' if finished else 'an unfinished'} run of "
            "another config; "
            "fields that differ (there -> here):\n  " + "\n  ".join(changed) + "\n"
            "Pass another --workdir, or --overwrite to move the old run to a backup and start anew."
        )
    if finished:
        raise ValueError(
            f"{workdir}: this run is finished (see {workdir / 'report.md'}). Pass --overwrite to "
            "move it to a backup and start anew, or another --workdir."
        )
    return True


def claim(config: Any, workdir: Path) -> Path | None:
    """Makes `workdir`, which `inspect` has seen, a new run of `config`.

    Returns: Where a run that was there has been moved: `<workdir>.1`, or the next number that is
        free.
    """
    backup = None
    if workdir.exists() and any(workdir.iterdir()):
        backup = free_name(workdir)
        workdir.rename(backup)
    workdir.mkdir(parents=True, exist_ok=True)
    write_json(workdir / "config.json", to_dict(config))
    return backup


def read_config(workdir: Path, cls: type = TrainConfig) -> Any:
    """The config of a run's folder. Raises: ValueError: Its `config.json` is no `cls`."""
    path = workdir / "config.json"
    try:
        return from_dict(json.loads(path.read_text()), cls)
    except (ValueError, TypeError, AttributeError) as error:
        raise ValueError(
            f"{path}: is no config of this version and kind ({error}). Pass another --workdir, or "
            "--overwrite."
        ) from error


def free_name(path: Path) -> Path:
    """`path.1`, or with the next number that is free."""
    number = 1
    while (candidate := path.with_name(f"{path.name}.{number}")).exists():
        number += 1
    return candidate


def write_json(path: Path, value: Any) -> None:
    """Writes `value`, all or nothing: under another name first, then renamed."""
    write_text(path, json.dumps(value, indent=2) + "\n")


def write_text(path: Path, text: str) -> None:
    """Writes `text`, all or nothing. Raises: DiskFull."""
    temporary = path.with_name(f".{path.name}.tmp")
    try:
        with temporary.open("w") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    except OSError as error:
        temporary.unlink(missing_ok=True)
        if is_disk_full(error):
            raise DiskFull(path.name, path.parent) from error
        raise
