"""The leaderboard of PTQ: every config on every scheme, on one model and one text, over seeds.

    python -m experiments.ptq_study --model stories260K.gguf --out runs/ptq \\
        --text_train text:train.txt --text_valid text:valid.txt --separator '<|endoftext|>'

`--also 'NAME CARD FIELD=VALUE ...'` adds a row: a card with some fields of its own. Every run is an
ordinary folder of `experiments.quantize`, so that the study can be stopped at any moment and goes
on where it was. The table, increases of the loss over the float model in nats per token, is written
anew after every run, from those that are finished.
"""

import json
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from absl import flags
from rich.console import Console

from experiments import config_files, runtime
from experiments.models import load_source
from lowbit_jax.ptq.job import QuantizeConfig, quantize
from lowbit_jax.reporting.report import markdown_table


def study(
    configs: dict[str, QuantizeConfig],
    schemes: Sequence[str],
    model: str,
    out: Path,
    seeds: Sequence[int] = (0,),
) -> str:
    """Runs what is missing and returns the table as Markdown.

    Args:
        configs: A name for each row and its config.
        schemes: Presets or rules.
        model: Path of the float model.
        out: Folder of all runs.
        seeds: Of every run.
    """
    source = None
    for seed in seeds:
        for scheme in schemes:
            for name, config in configs.items():
                workdir = run_folder(out, name, scheme, seed)
                if (workdir / "summary.json").exists():
                    continue
                source = source or load_source(model)
                field = "rules" if "=" in scheme else "scheme"
                changed = config.replace({field: scheme, "seed": seed})
                quantize(changed, source, workdir, console=Console(quiet=True))
                text = table(list(configs), schemes, out, seeds)
                (out / "study.md").write_text(text)
                print(text, flush=True)
    return table(list(configs), schemes, out, seeds)


def run_folder(out: Path, name: str, scheme: str, seed: int) -> Path:
    """The folder of one run: the scheme's letters and digits, the row's name and the seed."""
    slug = "".join(c if c.isalnum() or c == "_" else "-" for c in scheme).strip("-")
    return out / slug / f"{name}-seed{seed}"


def table(names: Sequence[str], schemes: Sequence[str], out: Path, seeds: Sequence[int]) -> str:
    """Increase of the loss, its standard error over the text, and seconds, of the finished runs.

    Over several seeds: the mean, behind ± the standard deviation, and how many.
    """
    rows = []
    for name in names:
        cells = [
            _cell([run_folder(out, name, scheme, seed) / "summary.json" for seed in seeds])
            for scheme in schemes
        ]
        rows.append((name, *cells))
    return "\n".join(markdown_table(("config", *schemes), rows)) + "\n"


def _cell(files: Sequence[Path]) -> str:
    found: list[dict[str, Any]] = [json.loads(f.read_text()) for f in files if f.exists()]
    if not found:
        return ""
    increases = [each["packed"]["nll"] - each["float"]["nll"] for each in found]
    seconds = statistics.median(each["seconds"] for each in found)
    if len(found) == 1:
        error = found[0]["packed"].get("increase_se")
        detail = f"{seconds:.0f} s" if error is None else f"se {error:.4f}, {seconds:.0f} s"
        return f"{increases[0]:+.4f} ({detail})"
    spread = statistics.stdev(increases)
    mean = statistics.mean(increases)
    return f"{mean:+.4f} ± {spread:.4f} ({len(found)} seeds, {seconds:.0f} s)"


def main(argv: Sequence[str]) -> None:
    """Runs the study that the flags describe."""
    del argv
    asked = flags.FLAGS
    changes = [
        f"model.path={asked.model}",
        f"calibration.source={asked.text_train}",
        f"calibration.separator={asked.separator}",
        f"calibration.documents={asked.documents}",
        f"evaluation.source={asked.text_valid}",
        f"evaluation.separator={asked.separator}",
        *asked.set,
    ]
    configs = config_files.rows(asked.configs, asked.also, "", changes)
    out = Path(asked.out)
    out.mkdir(parents=True, exist_ok=True)
    seeds = [int(seed) for seed in asked.seeds]
    print(study(configs, asked.scheme, asked.model, out, seeds))


if __name__ == "__main__":
    flags.DEFINE_list(
        "configs", ["ptq_rtn.py", "ptq_gptq.py", "ptq_awq.py", "ptq_autoround.py"], "Cards."
    )
    flags.DEFINE_multi_string(
        "also", [], "'NAME CARD PATH=VALUE ...': one more row, a card with fields set."
    )
    flags.DEFINE_multi_string(
        "scheme",
        ["w4a16_asym", "w3a16_asym", "w2a16_asym"],
        "A preset, or rules pattern=preset;...",
    )
    flags.DEFINE_list("seeds", ["0"], "Every row runs once with each.")
    flags.DEFINE_string("model", "runs/float", "As --config.model.path.")
    flags.DEFINE_string("text_train", "stdlib", "As --config.calibration.source.")
    flags.DEFINE_string("text_valid", "stdlib", "As --config.evaluation.source.")
    flags.DEFINE_string("separator", "", "Where text files are cut into documents.")
    flags.DEFINE_integer("documents", 0, "As --config.calibration.documents.")
    flags.DEFINE_multi_string("set", [], "PATH=VALUE: sets a field of every config.")
    flags.DEFINE_string("out", "runs/ptq_study", "Folder of all runs and of study.md.")
    runtime.run(main)
