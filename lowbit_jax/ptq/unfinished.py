"""A fit that was stopped in the middle, and the request to stop.

A fit's steps draw by their number, so that what is behind step n depends on its parameters and its
optimizer's state alone: kept on disk, they go on to the same bits.
"""

import dataclasses
import hashlib
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import numpy as np

from lowbit_jax.ptq.arrays import read_tree, write_tree


class Stopped(Exception):
    """The run was asked to stop, and did; what it had finished is on disk."""


def never() -> bool:
    """The request that does not come."""
    return False


@dataclasses.dataclass
class Unfinished:
    """Where the fit that runs now is kept.

    Attributes:
        folder: Holds the states of unfinished fits; None: nothing is kept.
        stop: Asked between two stretches of work; true ends the run.
        every: Seconds of a fit between two savings; a fit that takes less is not kept.
        tag: Names the fit inside its run.
    """

    folder: Path | None = None
    stop: Callable[[], bool] = never
    every: float = 60.0
    tag: str = ""

    def __post_init__(self):
        self._saved = time.monotonic()

    def tagged(self, tag: str) -> "Unfinished":
        """The same for the fit of that name, which begins now."""
        return dataclasses.replace(self, tag=tag)

    @property
    def _path(self) -> Path | None:
        if self.folder is None:
            return None
        return self.folder / hashlib.sha256(self.tag.encode()).hexdigest()[:16]

    def load(self, carry: Any) -> tuple[int, list[float], Any]:
        """(steps done, their objectives summed by tenths, carry); as given, if none is kept."""
        if self._path is None or not self._path.is_dir():
            return 0, [], carry
        tree = read_tree(self._path)
        leaves, treedef = jax.tree.flatten(carry)
        kept = [tree["carry"][f"{i:06d}"] for i in range(len(leaves))]
        like = [jax.numpy.asarray(x, y.dtype) for x, y in zip(kept, leaves, strict=True)]
        sums = [float(x) for x in np.atleast_1d(tree["sums"])]
        return int(tree["done"]), sums, jax.tree.unflatten(treedef, like)

    def advance(self, done: int, sums: list[float], carry: Any, *, last: bool) -> None:
        """Says that a fit is behind step `done`; keeps it where that is due.

        Raises:
            Stopped: `stop` asked for it.
        """
        stopping = not last and self.stop()
        if self._path is not None and (stopping or time.monotonic() - self._saved >= self.every):
            leaves = {f"{i:06d}": leaf for i, leaf in enumerate(jax.tree.leaves(carry))}
            tree = {"done": np.int64(done), "sums": np.asarray(sums), "carry": leaves}
            write_tree(self._path, tree)
            self._saved = time.monotonic()
        if stopping:
            raise Stopped(f"{self.tag}, behind step {done}")

    def check(self) -> None:
        """Raises Stopped if `stop` asks for it."""
        if self.stop():
            raise Stopped(self.tag or "before the first block")
