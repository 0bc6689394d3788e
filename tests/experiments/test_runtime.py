import errno
import subprocess
import sys
from pathlib import Path

import pytest
from absl import app, flags

from experiments import runtime
from lowbit_jax.training.errors import CheckpointError, DiskFull, Interrupted, NotFinite


@pytest.fixture(autouse=True)
def parsed(monkeypatch):
    monkeypatch.setattr(sys, "argv", ["prog"])
    flags.FLAGS(["prog"])
    yield
    flags.FLAGS.unparse_flags()


def leaving(error):
    def main(argv):
        raise error

    with pytest.raises(SystemExit) as left:
        runtime.main_errors(main)(["prog"])
    return left.value.code


@pytest.mark.parametrize(
    ("error", "code", "message"),
    [
        (ValueError("wrong"), 1, "error: wrong\n(--traceback shows"),
        (NotImplementedError("not here"), 1, "error: not here"),
        (FileNotFoundError("no such file"), 1, "error: no such file"),
        (OSError(errno.ENOSPC, "No space left on device"), 1, "error: no space left on the device"),
        (DiskFull("summary.json", Path("runs/a")), 1, "while writing summary.json to runs/a"),
        (CheckpointError("damaged"), 1, "error: damaged"),
        (NotFinite(7, float("nan"), 1.0, "Kept."), 1, "step 7: loss nan, gradient norm 1.0"),
        (Interrupted(15, "after step 3", Path("runs/a")), 143, "stopped by SIGTERM after step 3"),
        (KeyboardInterrupt(), 130, "interrupted"),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, BaseException) else None,
)
def test_what_can_happen_to_a_run_is_one_message_and_a_code(capsys, error, code, message):
    assert leaving(error) == code
    shown = capsys.readouterr().err
    assert message in shown
    assert "Traceback" not in shown


def test_bugs_and_asked_for_tracebacks_keep_theirs():
    def main(argv):
        raise AssertionError("a bug")

    with pytest.raises(AssertionError, match="a bug"):
        runtime.main_errors(main)(["prog"])
    flags.FLAGS(["prog", "--traceback"])

    def wrong(argv):
        raise ValueError("wrong")

    with pytest.raises(ValueError, match="wrong"):
        runtime.main_errors(wrong)(["prog"])


def test_stray_arguments_are_refused_unless_wanted():
    seen = []
    with pytest.raises(app.UsageError, match="unexpected arguments"):
        runtime.main_errors(seen.append)(["prog", "stray"])
    runtime.main_errors(seen.append, takes_arguments=True)(["prog", "run"])
    assert seen == [["prog", "run"]]


@pytest.mark.skipif(sys.platform != "linux", reason="mallopt is glibc's")
def test_memory_freed_once_is_not_faulted_in_again():
    code = """
import ctypes, resource, sys
if sys.argv[1] == "keep":
    from experiments.runtime import keep_freed_memory
    assert keep_freed_memory()
libc = ctypes.CDLL(None)
libc.malloc.restype = ctypes.c_void_p
def faults():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(4):
        block = ctypes.c_void_p(libc.malloc(2**25))
        libc.memset(block, 1, 2**25)
        libc.free(block)
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before
faults()
print(faults())
"""
    kept, given_back = (
        int(
            subprocess.run(
                [sys.executable, "-c", code, mode], capture_output=True, check=True
            ).stdout
        )
        for mode in ("keep", "default")
    )
    # 4 x 32 MiB are 32,768 pages of 4 KiB (64 huge ones); kept, they are there already.
    assert kept < 32 < given_back
