"""Measures ratios in one run: python -m experiments.benchmark --suite qat_step

Correctness is checked first; the table is printed and, with --out, written as Markdown and JSON.
"""

import dataclasses
import json
from collections.abc import Sequence
from pathlib import Path

from absl import app, flags

_SUITE = flags.DEFINE_enum("suite", "qat_step", ["qat_step"], "What is measured.")
_ROUNDS = flags.DEFINE_integer("rounds", 12, "How often each contender is timed.", lower_bound=3)
_SCHEMES = flags.DEFINE_list("schemes", None, "Presets to measure; default: the suite's own list.")
_OUT = flags.DEFINE_string("out", None, "Folder for the table as Markdown and JSON.")


def main(argv: Sequence[str]) -> None:
    """Runs the suite that the flags name."""
    if len(argv) > 1:
        raise app.UsageError(f"unexpected arguments: {argv[1:]}")
    from experiments.benchmarks import qat_step

    sizes = qat_step.Sizes()
    schemes = tuple(_SCHEMES.value or qat_step.SCHEMES)
    timings = qat_step.measure(sizes, rounds=_ROUNDS.value, schemes=schemes)
    text = qat_step.table(timings, sizes)
    print(text)
    if _OUT.value:
        out = Path(_OUT.value)
        out.mkdir(parents=True, exist_ok=True)
        (out / f"{_SUITE.value}.md").write_text(text + "\n")
        rows = [dataclasses.asdict(timing) for timing in timings]
        (out / f"{_SUITE.value}.json").write_text(json.dumps(rows, indent=1))


if __name__ == "__main__":
    app.run(main)
