"""Fuzzes a reader of files: uv run python tests/fuzzing/fuzz.py --reader gguf --seconds 600

Sound files are damaged at random (mutations.py) and read in a process of their own. The only
allowed ends are a model and a ValueError, NotImplementedError or FileNotFoundError that says
something: anything else is a failure, as is a process that dies or that works more than --patience
seconds on one file, and memory beyond twice the file: as Python and numpy count it (every fourth
file) with what a sound one takes and 1 MiB, as the system counts it with 64 MiB. Damage is drawn
from --seed and its number alone, so `--first N --count 1` repeats one. Failing files are kept in
--out.
"""

import argparse
import contextlib
import json
import resource
import shutil
import subprocess
import sys
import tempfile
import time
import traceback
import tracemalloc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

sys.path.insert(0, str(Path(__file__).parent))

import corpora
import mutations

_ALLOWED = (ValueError, NotImplementedError, FileNotFoundError)
_MIB = 2**20


def arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--reader", choices=sorted(corpora.READERS), required=True)
    parser.add_argument("--seconds", type=float, default=600)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--first", type=int, default=0, help="number of the first damage")
    parser.add_argument("--count", type=int, default=2**62, help="how many, at most")
    parser.add_argument("--patience", type=float, default=30, help="processor seconds for a file")
    parser.add_argument("--out", type=Path, help="where failing files are kept")
    parser.add_argument("--work", type=Path, help=argparse.SUPPRESS)  # of a child
    return parser.parse_args()


def main() -> int:
    """Starts children, and another where one ends; prints what was found as JSON."""
    options = arguments()
    if options.work:
        return child(options)
    failures, first, end = [], options.first, time.monotonic() + options.seconds
    deaths = 0
    with tempfile.TemporaryDirectory() as work:
        report = Path(work) / "report"
        while (left := end - time.monotonic()) > 0 and first < options.first + options.count:
            count = options.first + options.count - first
            changes = {"--work": work, "--first": first, "--count": count, "--seconds": left}
            command = [sys.executable, __file__, *sys.argv[1:]]
            command += [str(part) for pair in changes.items() for part in pair]
            process = subprocess.Popen(command)
            reason = watched(process, report, options.patience)
            last, found = read_report(report)
            failures += found
            if reason is None:
                first = last + 1
                break
            deaths += 1
            failures.append({"number": last, "what": reason})
            first = max(last, first) + 1
            if deaths > 20 or last < 0:  # it did not even begin
                break
    tried = first - options.first
    result = {"reader": options.reader, "seed": options.seed, "files": tried, "failures": failures}
    print(json.dumps(result, indent=1))
    return 1 if failures else 0


def watched(process: subprocess.Popen[bytes], report: Path, patience: float) -> str | None:
    """Waits for a child; returns why it ended, None if it was done."""
    last, since = -1, 0.0
    while process.poll() is None:
        time.sleep(0.5)
        current = read_report(report)[0] if report.exists() else -1
        with contextlib.suppress(FileNotFoundError, ProcessLookupError, IndexError):
            fields = Path(f"/proc/{process.pid}/stat").read_text().rsplit(")", 1)[1].split()
            seconds = (int(fields[11]) + int(fields[12])) / 100
            if current != last:
                last, since = current, seconds
            elif current >= 0 and seconds - since > patience:
                process.kill()
                process.wait()
                return f"worked for more than {patience} s"
    return None if process.returncode == 0 else f"the process ended with {process.returncode}"


def read_report(report: Path) -> tuple[int, list[dict[str, Any]]]:
    """The number of the damage at work, and the failures so far."""
    if not report.exists():
        return -1, []
    lines = report.read_text().splitlines()
    done = [json.loads(line) for line in lines if line.startswith("{")]
    numbers = [int(line) for line in lines if line.isdecimal()]
    return (numbers[-1] if numbers else -1), done


def child(options: argparse.Namespace) -> int:
    """Damages and reads until the time is up."""
    reader = corpora.READERS[options.reader]
    work, report = options.work, options.work / "report"
    sound = work / "sound"
    shutil.rmtree(sound, ignore_errors=True)
    sound.mkdir()
    samples = [content(path) for path in reader.make(sound)]
    paths = sorted(sound.iterdir())
    for path in paths:
        reader.read(path)  # compiles what it will, and shows that the samples are sound
    usual = max(traced_peak(lambda path=path: reader.read(path)) for path in paths)
    end = time.monotonic() + options.seconds
    limit = status("VmSize") + 4096 * _MIB
    resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
    found: list[str] = []
    number = options.first
    for number in range(options.first, options.first + options.count):
        if time.monotonic() > end:
            break
        report.write_text("\n".join([*found, str(number)]))
        rng = np.random.default_rng([options.seed, number])
        name, files = samples[rng.integers(len(samples))]
        files = mutations.damaged(rng, files)
        place = work / "damaged" / name
        shutil.rmtree(work / "damaged", ignore_errors=True)
        write(place, files)
        size = sum(map(len, files.values()))
        what = attempt(reader, place, size, usual if number % 4 == 0 else None)
        if what is not None:
            found.append(json.dumps({"number": number, "what": what}))
            if options.out:
                kept = options.out / f"{options.reader}-{options.seed}-{number}"
                shutil.rmtree(kept, ignore_errors=True)
                shutil.copytree(work / "damaged", kept)
    report.write_text("\n".join([*found, str(number - 1)]))
    return 0


def attempt(reader: corpora.Reader, path: Path, size: int, usual: int | None) -> str | None:
    """Reads one file; returns what was wrong with that. `usual`: traced bytes of sound files."""
    before = status("VmRSS")
    with contextlib.suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")  # the peak begins anew
    wrong, peak = None, 0

    def read() -> None:
        nonlocal wrong
        try:
            reader.read(path)
        except _ALLOWED as error:
            if not str(error).strip():
                wrong = f"an error without words: {type(error).__name__}"
        except BaseException:  # whatever it is, it is found
            wrong = traceback.format_exc(limit=-6)

    if usual is None:
        read()
    else:
        peak = traced_peak(read)
        if wrong is None and peak > 2 * size + usual + _MIB:
            wrong = f"{peak} bytes at once for files of {size}, where sound ones take {usual}"
    grown = status("VmHWM") - before
    if wrong is None and grown > 2 * size + 64 * _MIB:
        wrong = f"the process grew by {grown} bytes for files of {size}"
    return wrong


def traced_peak(call: Callable[[], Any]) -> int:
    """Most bytes that Python and numpy held at once during a call."""
    tracemalloc.start()
    try:
        call()
        return tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()


def content(path: Path) -> tuple[str, dict[str, bytes]]:
    """A file or folder by the names of its files, "" for a file itself."""
    if path.is_file():
        return path.name, {path.name: path.read_bytes()}
    return path.name, {
        str(file.relative_to(path)): file.read_bytes()
        for file in sorted(path.rglob("*"))
        if file.is_file()
    }


def write(place: Path, files: dict[str, bytes]) -> None:
    """The inverse of `content`."""
    alone = set(files) <= {place.name}
    for name, raw in files.items():
        file = place if alone else place / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes(raw)


def status(field: str) -> int:
    """A size of this process in bytes, as Linux counts it."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(f"{field}:"):
            return int(line.split()[1]) * 1024
    raise NotImplementedError(f"/proc/self/status has no {field}.")


if __name__ == "__main__":
    sys.exit(main())
