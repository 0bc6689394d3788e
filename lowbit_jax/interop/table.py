"""What an export wrote of each tensor, and in which cases it says no."""

import dataclasses
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
from rich.table import Table


@dataclasses.dataclass(frozen=True)
class Written:
    """One tensor of an export.

    path: Of the leaf in our model.
    name: In the file.
    was: What it was: a spec in words, or "float".
    now: What it became.
    why: Why it is not what it was; "" if it is.
    """

    path: str
    name: str
    was: str
    now: str
    why: str = ""

    @property
    def lost(self) -> bool:
        """Whether it had codes that the file does not have."""
        return self.was != "float" and "float" in self.now


def table_of(rows: Sequence[Written], where: Path) -> Table:
    """The tensors that had codes and lost them, or changed otherwise; and how many did not."""
    table = Table(title=f"{where}: {len(rows)} tensors")
    for column in ("tensor", "was", "written as", "why"):
        table.add_column(column)
    for row in rows:
        if row.why:
            table.add_row(row.name, row.was, row.now, row.why)
    kept: dict[tuple[str, str], int] = {}
    for row in rows:
        if not row.why:
            kept[row.was, row.now] = kept.get((row.was, row.now), 0) + 1
    for (was, now), count in kept.items():
        table.add_row(f"{count} tensors", was, now, "")
    return table


def require_strict(rows: Sequence[Written], format: str) -> None:
    """Raises ValueError that names the tensors whose codes the file would not have."""
    lost = [row for row in rows if row.lost]
    if lost:
        shown = "; ".join(f"{row.path}: {row.why}" for row in lost[:5])
        more = f" and {len(lost) - 5} more" if len(lost) > 5 else ""
        raise ValueError(
            f"export to {format}, strict: {len(lost)} quantized tensors would be written "
            f"dequantized: {shown}{more}. Leave --strict out, or quantize these layers otherwise."
        )


def as_float16(values: np.ndarray, what: str) -> np.ndarray:
    """Values in float16, rounded once. Raises: ValueError: One of them is not finite then."""
    with np.errstate(over="ignore"):
        stored = values.astype(np.float16)
    bad = int(stored.size - np.isfinite(stored).sum())
    if bad:
        raise ValueError(f"{what}: {bad} of {stored.size} values are not finite in float16.")
    return stored


def rounded_scales(scales: Any, stored: Any) -> str:
    """A remark if scales changed when they were stored; else ""."""
    before, after = np.float32(scales), np.float32(stored)
    changed = before != after
    if not changed.any():
        return ""
    worst = np.max(np.abs(after - before)[changed] / np.abs(before)[changed])
    return f"scales rounded to float16 (by up to {worst:.1e})"


@contextmanager
def whole(path: Path) -> Iterator[Path]:
    """A path beside `path` to write to, which takes its name only when everything is written.

    Raises: ValueError: `path` is there already.
    """
    if path.exists():
        raise ValueError(f"{path} exists already. Choose another path, or remove it.")
    partial = path.with_name(f".{path.name}.partial")
    _remove(partial)
    path.parent.mkdir(parents=True, exist_ok=True)
    try:
        yield partial
        partial.rename(path)
    finally:
        _remove(partial)


def _remove(path: Path) -> None:
    if path.is_dir():
        for child in path.iterdir():
            child.unlink()
        path.rmdir()
    else:
        path.unlink(missing_ok=True)
