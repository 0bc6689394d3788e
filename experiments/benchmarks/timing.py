"""Interleaved timing: all contenders take turns, so that a busy machine slows all of them alike."""

import dataclasses
import time
from collections.abc import Callable, Mapping
from typing import Any

import jax
import numpy as np


@dataclasses.dataclass(frozen=True)
class Timing:
    """Seconds of one contender.

    Attributes:
        name: Of the contender.
        seconds: One measurement per round.
        ratio: Median over the rounds of its seconds over the baseline's in the same round.
        ratio_low: 25th percentile of the same.
        ratio_high: 75th percentile of the same.
    """

    name: str
    seconds: tuple[float, ...]
    ratio: float
    ratio_low: float
    ratio_high: float

    @property
    def median(self) -> float:
        """Median seconds."""
        return float(np.median(self.seconds))


def interleaved(
    contenders: Mapping[str, Callable[[], Any]], *, rounds: int, baseline: str, before: int = 0
) -> list[Timing]:
    """Times every contender once a round, in a new order each round.

    Call each once before, so that it is compiled.

    Args:
        contenders: Name to a function that starts one run and returns its arrays.
        rounds: How often each is timed.
        baseline: What the ratios are to.
        before: Untimed calls in front of each timed one, so that it meets its own caches and
            threads and not the last contender's.
    """
    order = np.random.default_rng(0)
    seconds: dict[str, list[float]] = {name: [] for name in contenders}
    names = list(contenders)
    for _ in range(rounds):
        for index in order.permutation(len(names)):
            for _ in range(before):
                jax.block_until_ready(contenders[names[index]]())
            start = time.perf_counter()
            jax.block_until_ready(contenders[names[index]]())
            seconds[names[index]].append(time.perf_counter() - start)
    base = np.asarray(seconds[baseline])
    timings = []
    for name, values in seconds.items():
        low, middle, high = np.percentile(np.asarray(values) / base, [25, 50, 75])
        timings.append(Timing(name, tuple(values), float(middle), float(low), float(high)))
    return timings
