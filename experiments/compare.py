"""Runs side by side, as Markdown and PNG; of runs that were quantized, a leaderboard.

python -m experiments.compare runs/float runs/qat_ternary --out runs/compare
python -m experiments.compare runs/ptq_rtn runs/ptq_gptq --out runs/leaderboard
"""

from collections.abc import Sequence
from pathlib import Path

from absl import app, flags

from experiments import runtime
from lowbit_jax.reporting.compare import compare
from lowbit_jax.training.runs import read_summary

_OUT = flags.DEFINE_string("out", "runs/compare", "Folder for compare.md and compare.png.")


def main(argv: Sequence[str]) -> None:
    """Compares."""
    runs = [Path(run) for run in argv[1:]]
    if not runs:
        raise app.UsageError("give the folders of one or more finished runs")
    names = [run.resolve().name for run in runs]
    labels = names if len(set(names)) == len(names) else [str(run) for run in runs]
    summaries = {label: read_summary(run) for label, run in zip(labels, runs, strict=True)}
    print(compare(summaries, Path(_OUT.value)))
    print(f"{Path(_OUT.value) / 'compare.md'}, {Path(_OUT.value) / 'compare.png'}")


if __name__ == "__main__":
    runtime.run(main, takes_arguments=True)
