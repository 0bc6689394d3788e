"""Reading a step's metrics without making the device wait."""

import time
from collections.abc import Callable

import jax

from lowbit_jax.training.step import Metrics


class OneStepLag:
    """Reads a step's metrics while the next one runs, so that the device never waits for Python."""

    def __init__(self, note: Callable[[int, tuple[float, float, float]], None]):
        self._note = note
        self._pending: tuple[int, Metrics] | None = None
        self._clock = time.perf_counter()

    def push(self, step: int, metrics: Metrics) -> None:
        """Notes the step before this one."""
        self.drain()
        self._pending = (step, metrics)

    def drain(self) -> None:
        """Waits for the pending step, if there is one."""
        if self._pending is None:
            return
        step, metrics = self._pending
        self._pending = None
        loss, grad_norm = jax.device_get(metrics)
        now = time.perf_counter()
        seconds, self._clock = now - self._clock, now
        self._note(step, (float(loss), float(grad_norm), seconds))

    def restart_clock(self) -> None:
        """After work that is no step."""
        self._clock = time.perf_counter()
