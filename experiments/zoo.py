"""The zoo: one small language model, every method of weights, at equal steps and one seed.

    python -m experiments.zoo --out runs/zoo

Every preset of `METHODS` trains the study's model (0.13 M parameters, 2 layers of 64) on the
standard library's source for `--steps` steps at one learning rate, and is packed and measured. Each
run is an ordinary run's folder, so that the sweep can be stopped at any moment and goes on where it
was. zoo.md, the
best method of every width, and zoo.png, the loss by the bits of a weight, are written anew behind
each run, from those that are finished.

Activations stay float, so that methods of weights are compared by the bits that they store. At this
width (64 inputs) a scale per channel takes half a bit a weight; in a large model it takes none.
"""

import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Final

import jax
from absl import flags

from experiments import runtime
from experiments.study import run
from lowbit_jax.reporting.plots import pareto, plot_pareto
from lowbit_jax.reporting.report import markdown_table
from lowbit_jax.training.config import OptimConfig, TrainConfig

METHODS: Final = (
    "", "w1a16_bc", "w1a16", "w1a16_pc", "w1a16_bitnet", "w1a16_elastic", "w1a16_onebit",
    "w1_58a16", "w1_58a16_pc", "w1_58a16_twn", "w1_58a16_ttq", "w1_58a16_stretched",
    "w2a16", "w2a16_g32", "w2a16_asym", "w2a16_lsq", "w2a16_stretched", "w2a16_dorefa", "w2a16_lq",
    "w2a16_n2uq", "w3a16", "w3a16_g32", "w3a16_lsq", "w3a16_dorefa", "w3a16_lq", "w3a16_n2uq",
    "w4a16", "w4a16_g32", "w4a16_asym", "w4a16_lsq", "w4a16_g32_lsq", "w4a16_dorefa", "w4a16_lq",
    "w4a16_n2uq", "w4a16_pow2", "w4a16_inq", "nf4_g32", "mxfp4a16", "nvfp4a16", "w5a16_apot",
    "w5a16_apot_learned", "mxfp6_e2m3a16", "w8a16",
)  # fmt: skip
"""Presets of weights, from few bits to many; "" is float."""


def configs(methods: Sequence[str], *, steps: int, lr: float, seed: int) -> dict[str, TrainConfig]:
    """A run's config for each method.

    Raises: ValueError: An unknown one.
    """
    if unknown := sorted(set(methods) - {*METHODS, "float"}):
        raise ValueError(f"--methods: {unknown} are not in the zoo; it has {list(METHODS)}.")
    base = TrainConfig(name="zoo", optim=OptimConfig(scale_lr=0.1)).variant("study")
    changes: dict[str, Any] = {
        "steps": steps,
        "optim.lr": lr,
        "seed": seed,
        "optim.warmup": max(1, min(base.optim.warmup, steps // 10)),
        "eval_every": steps,
        "checkpoint_every": steps,
    }
    chosen = [("" if name == "float" else name) for name in methods] or METHODS
    return {
        name or "float": base.replace({**changes, "recipe": name, "name": f"zoo_{name or 'float'}"})
        for name in chosen
    }


def sweep(rows: dict[str, TrainConfig], out: Path) -> str:
    """Runs what is missing; returns the table as Markdown."""
    text = ""
    for name, config in rows.items():
        run(config, out / name)
        jax.clear_caches()
        text = write(rows, out)
    return text


def write(rows: dict[str, TrainConfig], out: Path) -> str:
    """Writes zoo.md and zoo.png from the runs that are finished; returns the former."""
    points = []
    for name in rows:
        file = out / name / "summary.json"
        if file.exists():
            summary = json.loads(file.read_text())
            points.append(
                {
                    "name": name,
                    "bits": summary["packed"]["bits_per_weight"],
                    "bits_per_byte": summary["packed"]["bits_per_byte"],
                    "fake_quantized": summary["valid"]["bits_per_byte"],
                    "tokens": summary["tokens"],
                }
            )
    front = [point["name"] for point in pareto(points)]
    cells = [
        (
            point["name"],
            f"{point['bits']:.2f}",
            f"{point['bits_per_byte']:.4f}",
            f"{point['fake_quantized']:.4f}",
            "yes" if point["name"] in front else "",
        )
        for point in sorted(points, key=lambda p: (p["bits"], p["bits_per_byte"]))
    ]
    header = ("method", "bits per weight", "bits/byte, packed", "fake-quantized", "unbeaten")
    tokens = points[0]["tokens"] if points else 0
    lines = [f"One seed, {tokens / 1e6:.1f} M tokens a run.", ""]
    lines += [*markdown_table(header, cells), "", "Best of its width, by the bits that it stores:"]
    lines += ["", *best_of_each_width(points), "", "![loss by bits](zoo.png)"]
    text = "\n".join(lines) + "\n"
    (out / "zoo.md").write_text(text)
    plot_pareto(points, out / "zoo.png", title=f"{tokens / 1e6:.1f} M tokens, one seed")
    return text


def best_of_each_width(points: Sequence[dict[str, Any]]) -> list[str]:
    """A line for every number of bits b: the least loss among methods of (b - 1, b] bits."""
    widths: dict[int, list[dict[str, Any]]] = {}
    for point in points:
        # Words are padded, and a per-tensor scale adds a little: 1.01 bits count as one.
        widths.setdefault(math.ceil(point["bits"] - 0.1), []).append(point)
    lines = []
    for bits, own in sorted(widths.items()):
        best = min(own, key=lambda p: p["bits_per_byte"])
        lines.append(
            f"- up to {bits}: `{best['name']}`, {best['bits']:.2f} bits, "
            f"{best['bits_per_byte']:.4f} bits/byte (of {len(own)})"
        )
    return lines


def main(argv: Sequence[str]) -> None:
    """Runs the sweep that the flags describe."""
    del argv
    values = flags.FLAGS
    rows = configs(values.methods, steps=values.steps, lr=values.lr, seed=values.seed)
    out = Path(values.out)
    out.mkdir(parents=True, exist_ok=True)
    print(sweep(rows, out))


if __name__ == "__main__":
    flags.DEFINE_list("methods", [], "Presets; none: all. `float` is the float model.")
    flags.DEFINE_integer("steps", 2000, "Steps of every run, 2,048 tokens each.")
    flags.DEFINE_float("lr", 8e-3, "Learning rate of every run.")
    flags.DEFINE_integer("seed", 0, "Seed of every run.")
    flags.DEFINE_string("out", "runs/zoo", "Folder of all runs, of zoo.md and zoo.png.")
    runtime.run(main)
