"""Measures ratios in one run: python -m experiments.benchmark --suite qat_step

qat_step: a step of quantization-aware training against a float one.
matmul: packed products against dense ones and other libraries.
decode: a whole model writing tokens.
checkpoint: saving and loading packed models against a plain copy of the same bytes.

Correctness is checked first; the table is printed and, with --out, written as Markdown and JSON.
"""

import dataclasses
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from absl import app, flags

_SUITE = flags.DEFINE_enum(
    "suite", "qat_step", ["qat_step", "matmul", "decode", "checkpoint"], "What is measured."
)
_ROUNDS = flags.DEFINE_integer("rounds", 12, "How often each contender is timed.", lower_bound=3)
_PARAMS = flags.DEFINE_float("params", 1e9, "checkpoint: parameters of the model.", lower_bound=1)
_DISK = flags.DEFINE_string("disk", None, "checkpoint: a folder on the disk that is measured.")
_SCHEMES = flags.DEFINE_list("schemes", None, "Schemes to measure; default: the suite's own list.")
_OUT = flags.DEFINE_string("out", None, "Folder for the table as Markdown and JSON.")


def main(argv: Sequence[str]) -> None:
    """Runs the suite that the flags name."""
    if len(argv) > 1:
        raise app.UsageError(f"unexpected arguments: {argv[1:]}")
    suites = {
        "qat_step": _qat_step,
        "matmul": _matmul,
        "decode": _decode,
        "checkpoint": _checkpoint,
    }
    text, rows = suites[_SUITE.value]()
    print(text)
    if _OUT.value:
        out = Path(_OUT.value)
        out.mkdir(parents=True, exist_ok=True)
        (out / f"{_SUITE.value}.md").write_text(text + "\n")
        rows = [dataclasses.asdict(row) for row in rows]
        (out / f"{_SUITE.value}.json").write_text(json.dumps(rows, indent=1))


def _qat_step() -> tuple[str, Sequence[Any]]:
    from experiments.benchmarks import qat_step

    sizes = qat_step.Sizes()
    schemes = tuple(_SCHEMES.value or qat_step.SCHEMES)
    timings = qat_step.measure(sizes, rounds=_ROUNDS.value, schemes=schemes)
    return qat_step.table(timings, sizes), timings


def _matmul() -> tuple[str, Sequence[Any]]:
    from experiments.benchmarks import matmul

    rate = matmul.bandwidth()
    rows = matmul.measure(rounds=_ROUNDS.value, names=_SCHEMES.value)
    if _OUT.value:
        Path(_OUT.value).mkdir(parents=True, exist_ok=True)
        matmul.plot(rows, Path(_OUT.value) / "matmul.png")
    return matmul.table(rows, rate), rows


def _decode() -> tuple[str, Sequence[Any]]:
    from experiments.benchmarks import decode

    sizes = decode.Sizes()
    timings = decode.measure(sizes, rounds=_ROUNDS.value)
    return decode.table(timings, sizes), timings


def _checkpoint() -> tuple[str, Sequence[Any]]:
    from experiments.benchmarks import checkpoint

    folder = None if _DISK.value is None else Path(_DISK.value)
    rows = checkpoint.measure(
        tuple(_SCHEMES.value or checkpoint.SCHEMES),
        params=_PARAMS.value,
        rounds=_ROUNDS.value,
        folder=folder,
    )
    return checkpoint.table(rows), rows


if __name__ == "__main__":
    app.run(main)
