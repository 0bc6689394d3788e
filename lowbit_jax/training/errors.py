"""Why a run stops before its end; each message says what happened and how to go on."""

import errno
import signal as signals
from pathlib import Path


class Interrupted(Exception):
    """A signal asked the run to stop; it has written where it was.

    exit_code: 128 + the signal's number, as shells count.
    """

    def __init__(self, number: int, where: str, folder: Path):
        self.exit_code = 128 + number
        super().__init__(
            f"stopped by {signals.Signals(number).name} {where}; its state is in {folder}. Run "
            "the same command again to go on from there."
        )


class NotFinite(Exception):
    """The loss or the gradient became NaN or infinite."""

    def __init__(self, step: int, loss: float, grad_norm: float, kept: str):
        super().__init__(
            f"step {step}: loss {loss}, gradient norm {grad_norm}: not finite, so this run stops. "
            f"{kept} "
            "A lower --config.optim.lr, a longer --config.optim.warmup or --config.dtype=float32 "
            "often helps "
            "(a changed config needs --overwrite or another --workdir)."
        )


class CheckpointError(Exception):
    """A checkpoint that cannot be read: truncated, foreign, or of another model."""


class DiskFull(Exception):
    """No space left while writing."""

    def __init__(self, what: str, where: Path, kept: str = ""):
        super().__init__(
            f"no space left on the device while writing {what} to {where}. {kept}"
            "Free some space and run the same command again."
        )


def is_disk_full(error: BaseException) -> bool:
    """Whether `error` is ENOSPC or EDQUOT, also when a library wrapped it in its own type."""
    seen: BaseException | None = error
    while seen is not None:
        if isinstance(seen, OSError) and seen.errno in (errno.ENOSPC, errno.EDQUOT):
            return True
        if "No space left on device" in str(seen) or "Disk quota exceeded" in str(seen):
            return True
        seen = seen.__cause__ or seen.__context__
    return False
