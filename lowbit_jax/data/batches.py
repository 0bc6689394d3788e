"""Batches of token windows: endless and shuffled for training, each token once for evaluation.

Training windows are `length + 1` tokens, `length` apart, so that each token is predicted once per
epoch. Epoch `e` shifts all windows by an offset and visits them in an order, both drawn from (seed,
e). Nothing else is state: batch `i` is a function of `i`, a resumed run needs only its step, and
every host computes its own rows.

Window number `i * batch + row` counts through all epochs: where a batch does not divide the
windows, it ends one epoch and begins the next, and no window is dropped.
"""

import dataclasses
import functools
import operator
from collections.abc import Iterator
from typing import SupportsIndex

import numpy as np
from jaxtyping import Bool, Int32, Integer


@dataclasses.dataclass(frozen=True, eq=False)
class TokenBatches:
    """An endless sequence: `batches[step]` is int32 [batch / process_count, length + 1].

    Always: equal steps give equal batches, in this run and in any other with the same fields.

    tokens: One flat integer array of any kind; an np.memmap stays on disk.
    batch: Windows in one step over all hosts.
    length: Tokens that one window predicts: the context length.
    seed: >= 0; decides offsets and orders.
    process_index, process_count: This host and how many there are; a host gets its share of each
        step's rows.

    Raises: ValueError: Sizes below one, `batch` not a multiple of `process_count`, or fewer tokens
        than one batch takes.

    Example:
        >>> batches = TokenBatches(np.arange(100, dtype=np.uint8), batch=2, length=8, seed=0)
        >>> batches[5].shape, batches.windows
        ((2, 9), 11)
    """

    tokens: Integer[np.ndarray, " n"]
    batch: int
    length: int
    seed: int
    process_index: int = 0
    process_count: int = 1

    def __post_init__(self):
        check_tokens(self.tokens)
        _check_sizes(self.batch, self.length)
        if self.seed < 0:
            raise ValueError(f"seed is {self.seed}; it must not be negative.")
        if self.batch % self.process_count:
            raise ValueError(
                f"a batch of {self.batch} windows does not divide among {self.process_count} "
                "hosts. The next that does: "
                f"{-(-self.batch // self.process_count) * self.process_count}."
            )
        if not 0 <= self.process_index < self.process_count:
            raise ValueError(
                f"process_index {self.process_index} is not in [0, {self.process_count})."
            )
        fitting = (len(self.tokens) - 1) // self.length
        if fitting < self.batch:
            raise ValueError(
                f"{len(self.tokens)} tokens are less than one batch: {self.batch} windows of "
                f"{self.length} tokens take {self.batch * self.length + 1}. At this length "
                f"{max(fitting, 0)} windows fit: lower `batch` or `length`, or use more text."
            )

    @property
    def windows(self) -> int:
        """Windows in one epoch: as many as fit behind any offset, and at least one batch."""
        return max(self.batch, (len(self.tokens) - self.length) // self.length)

    def __getitem__(self, step: SupportsIndex) -> Int32[np.ndarray, "rows {self.length}+1"]:
        step = operator.index(step)
        if step < 0:
            raise IndexError(f"step {step}: steps count from 0.")
        rows = self.batch // self.process_count
        first = step * self.batch + self.process_index * rows
        starts = np.array([self._start(number) for number in range(first, first + rows)])
        return _take(self.tokens, starts, self.length)

    def _start(self, number: int) -> int:
        """Where in the tokens the window begins that comes as the `number`-th in training."""
        epoch, place = divmod(number, self.windows)
        slack = min(self.length - 1, len(self.tokens) - 1 - self.windows * self.length)
        offset, order = _epoch(self.seed, epoch, self.windows, slack)
        return offset + int(order[place]) * self.length


def valid_windows(
    tokens: Integer[np.ndarray, " n"], length: int, batch: int
) -> Iterator[tuple[Int32[np.ndarray, "{batch} {length}+1"], Bool[np.ndarray, "{batch} {length}"]]]:
    """Yields consecutive windows and a mask of the targets that count.

    Always: every token but the first is a target once. Windows overlap by one token: the last
    target of one is the first input of the next. Every batch has the same shape; what is missing
    at the end is token 0 and masked.

    Raises: ValueError: Fewer than two tokens, or a size below one.
    """
    check_tokens(tokens)
    _check_sizes(batch, length)
    if len(tokens) < 2:
        raise ValueError(
            f"{len(tokens)} token(s): at least 2 are needed to predict one from another."
        )
    return _valid_windows(tokens, length, batch)


def check_tokens(tokens: np.ndarray) -> None:
    """Raises: ValueError: `tokens` is not one flat array of integers."""
    if tokens.ndim != 1 or not np.issubdtype(tokens.dtype, np.integer):
        raise ValueError(
            f"tokens must be one flat array of integers, not {tokens.dtype}{list(tokens.shape)}."
        )


def _check_sizes(batch: int, length: int) -> None:
    if batch < 1 or length < 1:
        raise ValueError(f"batch ({batch}) and length ({length}) must be at least 1.")


def _valid_windows(tokens, length, batch):
    # A function of its own, so that wrong arguments fail in the call and not in the first `next`.
    targets = len(tokens) - 1
    for first in range(0, targets, batch * length):
        starts = first + length * np.arange(batch)
        mask = starts[:, None] + np.arange(length) < targets
        if mask.all():
            yield _take(tokens, starts, length), mask
            continue
        padded = np.zeros(batch * length + 1, np.int32)
        rest = tokens[first:]
        padded[: len(rest)] = rest
        yield _take(padded, starts - first, length), mask


def _take(tokens, starts, length) -> np.ndarray:
    return tokens[starts[:, None] + np.arange(length + 1)].astype(np.int32)


# Two, because a batch can lie in two epochs.
@functools.lru_cache(maxsize=2)
def _epoch(seed: int, epoch: int, windows: int, slack: int) -> tuple[int, np.ndarray]:
    """The offset in [0, slack] and the order of the windows in one epoch.

    Made from Philox's raw numbers: NumPy keeps those for good, but may change how a Generator
    shuffles, and then a run resumed under a newer NumPy would see other data.
    """
    random = np.random.Philox(key=np.array([seed, epoch], np.uint64))
    offset = int(random.random_raw() % (slack + 1))
    return offset, np.argsort(random.random_raw(windows), kind="stable")
