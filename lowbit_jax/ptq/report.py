"""What a run of PTQ says: figures of every layer and block, as they come and at the end."""

import dataclasses
import json
import resource
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
from flax import nnx

Event = dict[str, Any]


def peak_memory_bytes() -> int:
    """Largest memory so far: of the accelerator where it counts, else of this process."""
    stats = jax.devices()[0].memory_stats() or {}
    if "peak_bytes_in_use" in stats:
        return int(stats["peak_bytes_in_use"])
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024  # Linux counts KiB


@dataclasses.dataclass
class Report:
    """Everything that was measured on the way.

    Attributes:
        layers: One row a layer: block, layer, spec, errors before (round-to-nearest) and after,
            damping and what else its solver says.
        blocks: One row a block: its output's relative squared error, seconds, peak memory.
        messages: What the user should know, such as a layer that was rounded to nearest.
        seconds: Of the whole run, those of the runs that it resumes included.
        peak_memory_bytes: See `peak_memory_bytes`.
        transformed: The float model behind the transforms, if it was asked for.
    """

    layers: list[Event] = dataclasses.field(default_factory=list)
    blocks: list[Event] = dataclasses.field(default_factory=list)
    messages: list[str] = dataclasses.field(default_factory=list)
    seconds: float = 0.0
    peak_memory_bytes: int = 0
    transformed: nnx.Module | None = None

    def to_dict(self) -> dict[str, Any]:
        """The figures as JSON-able values."""
        names = ("layers", "blocks", "messages", "seconds", "peak_memory_bytes")
        return {name: getattr(self, name) for name in names}


class Reporter:
    """Collects events into a report, a JSONL file and a callback."""

    def __init__(self, log: Path | None, on_event: Callable[[Event], None] | None):
        """Starts an empty report; `log` is appended to."""
        self.report = Report()
        self._log = log
        self._on_event = on_event

    def emit(self, kind: str, **fields: Any) -> None:
        """Takes an event: kind is "plan", "layer", "block", "message" or "done"."""
        event = {"kind": kind} | fields
        if kind == "layer":
            self.report.layers.append(fields)
        elif kind == "block":
            self.report.blocks.append(fields)
        elif kind == "message":
            self.report.messages.append(fields["text"])
        if self._log is not None:
            with self._log.open("a") as file:
                file.write(json.dumps(event) + "\n")
        if self._on_event is not None:
            self._on_event(event)

    def note(self, block: str) -> Callable[[str, dict[str, Any]], None]:
        """What a stage reports figures of a layer of this block by."""

        def take(path: str, figures: dict[str, Any]) -> None:
            figures = dict(figures)
            where = f"{block}/{path}" if block else path
            if "message" in figures:
                self.emit("message", text=f"{where}: {figures['message']}")
            self.emit("layer", block=block, layer=path, **figures)

        return take
