"""A progress bar with loss, tokens/s and time left; plain lines where no terminal is attached."""

import time
from types import TracebackType
from typing import Self

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

_SECONDS_BETWEEN_LINES = 10.0


class TrainProgress:
    """Shows how a run goes. Use as a context manager.

    Args:
        console: Where to.
        total: Steps of the whole run.
        tokens_per_step: Tokens one step trains on.
        start: Steps done already, by the run this one goes on from.
    """

    def __init__(self, console: Console, *, total: int, tokens_per_step: int, start: int = 0):
        self._console = console
        self._total = total
        self._tokens_per_step = tokens_per_step
        self._last_line = float("-inf")
        self._bar = Progress(
            TextColumn("training"),
            BarColumn(bar_width=None),
            MofNCompleteColumn(),
            TextColumn("loss {task.fields[loss]}"),
            TextColumn("{task.fields[speed]} tokens/s"),
            TimeRemainingColumn(),
            console=console,
            disable=not console.is_terminal,
        )
        self._task = self._bar.add_task(
            "train", total=total, completed=start, loss="...", speed="..."
        )

    def __enter__(self) -> Self:
        self._bar.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._bar.stop()

    def update(self, step: int, loss: float, tokens_per_second: float) -> None:
        """After every step: what the bar shows."""
        self._bar.update(
            self._task, completed=step, loss=f"{loss:.3f}", speed=f"{tokens_per_second:,.0f}"
        )

    def log(self, step: int, loss: float, tokens_per_second: float) -> None:
        """At log points: a line, where there is no bar, at most every ten seconds."""
        now = time.monotonic()
        due = now - self._last_line >= _SECONDS_BETWEEN_LINES or step == self._total
        if self._console.is_terminal or not due:
            return
        self._last_line = now
        left = (self._total - step) * self._tokens_per_step / tokens_per_second
        self.note(
            f"step {step}/{self._total}  loss {loss:.3f}  {tokens_per_second:,.0f} tokens/s  "
            f"{left // 60:.0f}:{left % 60:02.0f} left"
        )

    def note(self, text: str) -> None:
        """A line that stays, above the bar."""
        self._console.print(text, highlight=False, markup=False, soft_wrap=True)
