"""The accuracy table: every recipe at equal tokens, each at its best learning rate, over seeds.

    python -m experiments.study --out runs/study

First every config runs once per learning rate (seed 0, `--tune_share` of the steps); then each runs
at its best one with every seed. `--also 'NAME CARD FIELD=VALUE ...'` adds a row: a card with some
fields of its own, to compare recipes. Every run is an ordinary run's folder, so the study can be
stopped at any moment and goes on where it was; the table is written anew after each run, from those
that are finished.
"""

import json
import shlex
import statistics
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from absl import flags

from experiments import config_files, runtime
from lowbit_jax.reporting.report import markdown_table
from lowbit_jax.training.config import TrainConfig
from lowbit_jax.training.fields import flatten
from lowbit_jax.training.loop import train


def study(
    configs: dict[str, TrainConfig],
    out: Path,
    *,
    lrs: Sequence[float],
    seeds: Sequence[int],
    tune_share: float,
) -> str:
    """Runs what is missing and returns the table as Markdown.

    Args:
        configs: A name for each card and its config, all of the same size.
        out: Folder of all runs.
        lrs: Learning rates that are tried; a single one is taken untried.
        seeds: Of the final runs.
        tune_share: Steps of a tuning run over those of a final run.
    """
    best: dict[str, float] = {}
    for name, config in configs.items():
        if len(lrs) == 1:
            best[name] = lrs[0]
            continue
        short = {"steps": max(1, round(config.steps * tune_share)), "seed": 0}
        losses = {
            lr: run(config.replace({"optim.lr": lr, **short}), out / "tune" / f"{name}-lr{lr:g}")
            for lr in lrs
        }
        best[name] = min(losses, key=lambda lr: losses[lr]["valid"]["bits_per_byte"])
    for seed in seeds:
        for name, config in configs.items():
            changes = {"optim.lr": best[name], "seed": seed}
            run(config.replace(changes), out / f"{name}-seed{seed}")
            text = table(configs, out, best, seeds)
            (out / "study.md").write_text(text)
    return table(configs, out, best, seeds)


def run(config: TrainConfig, workdir: Path) -> dict[str, Any]:
    """The summary of one run; it is trained only if it is not finished."""
    summary = workdir / "summary.json"
    return json.loads(summary.read_text()) if summary.exists() else train(config, workdir)


def table(
    configs: dict[str, TrainConfig], out: Path, best: dict[str, float], seeds: Iterable[int]
) -> str:
    """Bits per byte of every config over its finished seeds, and the gap to the first config.

    The gap is taken seed by seed, since runs of one seed share data and initialization and move
    together; its spread is that of these differences.
    """
    seeds = list(seeds)
    rows: list[tuple[str, ...]] = []
    baseline: dict[int, float] = {}
    for name, config in configs.items():
        files = {seed: out / f"{name}-seed{seed}" / "summary.json" for seed in seeds}
        summaries = {s: json.loads(file.read_text()) for s, file in files.items() if file.exists()}
        if not summaries:
            continue
        values = {seed: each["packed"]["bits_per_byte"] for seed, each in summaries.items()}
        baseline = baseline or values
        gaps = [value - baseline[seed] for seed, value in values.items() if seed in baseline]
        first = next(iter(summaries.values()))
        rows.append(
            (
                name,
                config.recipe or "float",
                f"{first['packed']['bits_per_weight']:.2f}",
                f"{first['tokens'] / 1e6:.1f} M",
                f"{best[name]:g}",
                f"{statistics.mean(values.values()):.4f}",
                f"{_spread([*values.values()]):.4f}",
                str(len(values)),
                f"{statistics.mean(gaps):+.4f}" if gaps else "",
                f"{_spread(gaps):.4f}",
            )
        )
    header = (
        "config", "recipe", "bits per weight", "tokens", "lr", "bits/byte (mean)",
        "spread (standard deviation)", "seeds", "gap to the first", "spread of the gap",
    )  # fmt: skip
    return "\n".join(markdown_table(header, rows)) + "\n"


def _spread(values: Sequence[float]) -> float:
    return statistics.stdev(values) if len(values) > 1 else float("nan")


def configs(
    cards: Sequence[str], also: Sequence[str], variant: str, changes: Sequence[str]
) -> dict[str, TrainConfig]:
    """The rows of the table: every card, then those of `also`, as the flags write them.

    Args:
        cards: Files of configs.
        also: `NAME CARD PATH=VALUE ...` each.
        variant: Of every card.
        changes: `PATH=VALUE` each, for all rows.

    Raises: ValueError: An item of another form, an unknown field, a value of another type.
    """
    rows = {Path(card).stem: (card, [*changes]) for card in cards}
    for item in also:
        name, card, *fields = [*shlex.split(item), "", ""]
        if not card or name in rows:
            raise ValueError(f"--also {item!r}: must start with a new NAME and a CARD.")
        rows[name] = (card, [*changes, *filter(None, fields)])
    return {
        name: assigned(config_files.load(card, variant), fields)
        for name, (card, fields) in rows.items()
    }


def assigned(config: TrainConfig, items: Iterable[str]) -> TrainConfig:
    """A config with `PATH=VALUE` set, each value read as its field's type.

    Raises: ValueError: No `=`, an unknown field, or a value of another type.
    """
    for item in items:
        path, equals, text = item.partition("=")
        if not equals:
            raise ValueError(f"{item!r} is not of the form PATH=VALUE.")
        before = flatten(config).get(path, "")  # `replace` refuses an unknown one
        try:
            value = text if isinstance(before, str) else json.loads(text)
        except json.JSONDecodeError:
            value = text
        if type(value) is not type(before) and (type(before), type(value)) != (float, int):
            raise ValueError(f"{item!r}: {path} is a {type(before).__name__}, as {before!r}.")
        config = config.replace({path: value})
    return config


def main(argv: Sequence[str]) -> None:
    """Runs the study that the flags describe."""
    del argv
    values = flags.FLAGS
    cards = configs(values.configs, values.also, values.variant, values.set)
    out = Path(values.out)
    out.mkdir(parents=True, exist_ok=True)
    lrs, seeds = [float(lr) for lr in values.lrs], [int(seed) for seed in values.seeds]
    print(study(cards, out, lrs=lrs, seeds=seeds, tune_share=values.tune_share))


if __name__ == "__main__":
    flags.DEFINE_list(
        "configs",
        ["float.py", "qat_binary.py", "qat_ternary.py", "qat_int4.py", "qat_fp4.py"],
        "Cards.",
    )
    flags.DEFINE_multi_string(
        "also", [], "'NAME CARD PATH=VALUE ...': one more row, a card with fields set."
    )
    flags.DEFINE_string("variant", "study", "Variant of every card.")
    flags.DEFINE_list("lrs", ["4e-3", "8e-3", "1.6e-2", "3.2e-2"], "Learning rates that are tried.")
    flags.DEFINE_list("seeds", ["0", "1", "2"], "Seeds of the final runs.")
    flags.DEFINE_float("tune_share", 0.15, "Length of a tuning run, as a share.")
    flags.DEFINE_multi_string("set", [], "PATH=VALUE: sets a field of every config.")
    flags.DEFINE_string("out", "runs/study", "Folder of all runs and of study.md.")
    runtime.run(main)
