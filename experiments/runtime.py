"""What every entry point shares: start-up, errors as one message, the exit code."""

import ctypes
import functools
import sys
from collections.abc import Callable, Sequence
from typing import Any

import jax
from absl import app, flags, logging

from lowbit_jax.training.errors import (
    CheckpointError,
    DiskFull,
    Interrupted,
    NotFinite,
    is_disk_full,
)

_TRACEBACK = flags.DEFINE_bool("traceback", False, "Show where in the code an error came from.")
_DISTRIBUTED = flags.DEFINE_bool(
    "distributed", False, "Start jax.distributed first: one process per host of a pod or Slurm job."
)

# What the library raises for wrong input and for things that happen to a run; anything else is a
# bug and keeps its traceback.
EXPECTED = (
    ValueError,
    NotImplementedError,
    FloatingPointError,
    MemoryError,
    OSError,
    CheckpointError,
    DiskFull,
    NotFinite,
)


def run(
    main: Callable[[Sequence[str]], Any],
    *,
    parse: Callable[..., Any] | None = None,
    takes_arguments: bool = False,
) -> None:
    """`app.run` with `main_errors`.

    Args:
        main: Gets what is left of the command line.
        parse: Replaces the parsing of flags.
        takes_arguments: Whether arguments that are no flags are fine.
    """
    parser = app.parse_flags_with_usage if parse is None else _one_message(parse)
    app.run(main_errors(main, takes_arguments=takes_arguments), flags_parser=parser)


def main_errors(
    main: Callable[[Sequence[str]], Any], *, takes_arguments: bool = False
) -> Callable[[Sequence[str]], None]:
    """`main`, leaving with one message: code 1 on an expected error, 128 + n on signal n."""

    @functools.wraps(main)
    def guarded(argv: Sequence[str]) -> None:
        if len(argv) > 1 and not takes_arguments:
            raise app.UsageError(f"unexpected arguments: {argv[1:]}")
        _start()
        try:
            main(argv)
        except Interrupted as stop:
            _leave(str(stop), stop.exit_code)
        except KeyboardInterrupt:
            _leave("interrupted", 130)
        except EXPECTED as error:
            if _TRACEBACK.value:
                raise
            hint = "" if isinstance(error, CheckpointError | DiskFull | NotFinite) else _HINT
            message = str(error).strip() or type(error).__name__
            if is_disk_full(error) and not isinstance(error, DiskFull):
                message, hint = f"no space left on the device: {message}", ""
            _leave(f"error: {message}{hint}", 1)

    return guarded


_HINT = "\n(--traceback shows where in the code.)"


def keep_freed_memory() -> bool:
    """Lets glibc keep what is freed, instead of giving it back to the system after every step.

    XLA on the CPU allocates its buffers anew in every step; the page faults of getting them again
    were a fifth of a train step's processor time (docs/LOG.md). Returns whether there is a glibc
    to tell; call it before jax starts its threads.
    """
    if sys.platform != "linux":
        return False
    libc = ctypes.CDLL(None)
    if not hasattr(libc, "mallopt"):  # musl
        return False
    arena_max, mmap_max, trim_threshold = -8, -4, -1  # from malloc.h
    settings = ((arena_max, 1), (mmap_max, 0), (trim_threshold, 2**31 - 1))
    return all(libc.mallopt(name, value) == 1 for name, value in settings)


def _start() -> None:
    keep_freed_memory()
    if not any(arg.startswith(("-v", "--v")) for arg in sys.argv[1:]):
        # absl's default is INFO, and orbax tells a lot.
        logging.set_verbosity(logging.ERROR)
    if _DISTRIBUTED.value:
        jax.distributed.initialize()


def _one_message(parse: Callable[[Sequence[str]], Any]) -> Callable[[Sequence[str]], Any]:
    def guarded(argv: Sequence[str]) -> Any:
        try:
            return parse(argv)
        except ValueError as error:
            if "--traceback" in argv:
                raise
            _leave(f"error: {error}", 1)

    return guarded


def _leave(message: str, code: int) -> None:
    sys.stdout.flush()
    print(message, file=sys.stderr)
    sys.exit(code)
