"""metrics.jsonl: one JSON object a line, with `step` and `kind` ("train" or "eval") in each."""

import json
import os
from pathlib import Path
from types import TracebackType
from typing import Any, Self


class MetricsFile:
    """Appends rows to `metrics.jsonl`; every row is on its way to the disk when `write` returns.

    Args:
        workdir: The run's folder.
        resume_step: Rows of later steps, and a last row that a kill cut short, are dropped: the
            resumed run writes them again.
        keep: False: writes nothing (all but one process of a multi-host run).
    """

    def __init__(self, workdir: Path, *, resume_step: int = 0, keep: bool = True):
        self.path = workdir / "metrics.jsonl"
        self._file = None
        if keep:
            rows = [row for row in read_metrics(workdir) if row["step"] <= resume_step]
            temporary = self.path.with_name(".metrics.jsonl.tmp")
            temporary.write_text("".join(_line(row) for row in rows))
            temporary.replace(self.path)
            self._file = self.path.open("a")

    def write(self, row: dict[str, Any]) -> None:
        """Appends one row."""
        if self._file is not None:
            self._file.write(_line(row))
            self._file.flush()

    def sync(self) -> None:
        """Waits until the rows are on the disk itself."""
        if self._file is not None:
            os.fsync(self._file.fileno())

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if self._file is not None:
            self._file.close()


def read_metrics(workdir: Path) -> list[dict[str, Any]]:
    """All whole rows of a run's `metrics.jsonl`; none if there is no such file."""
    path = workdir / "metrics.jsonl"
    rows = []
    for line in path.read_text().splitlines() if path.exists() else []:
        try:
            rows.append(json.loads(line))
        except json.JSONDecodeError:
            break  # a kill cut the last row short
    return rows


def series(rows: list[dict[str, Any]], kind: str, field: str) -> tuple[list[int], list[float]]:
    """`(steps, values)` of one field of one kind of row."""
    found = [(row["step"], row[field]) for row in rows if row["kind"] == kind and field in row]
    return [step for step, _ in found], [value for _, value in found]


def _line(row: dict[str, Any]) -> str:
    return json.dumps(row) + "\n"
