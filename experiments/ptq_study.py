"""The leaderboard of PTQ: every config on every scheme, on one model and one text.

    python -m experiments.ptq_study --model stories260K.gguf --out runs/ptq \\
        --text_train text:train.txt --text_valid text:valid.txt --separator '<|endoftext|>'

Every run is an ordinary folder of `experiments.quantize`, so that the study can be stopped at any
moment and goes on where it was. The table, increases of the loss over the float model in nats per
token, is written anew after every run.
"""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from absl import flags
from rich.console import Console

from experiments import config_files, runtime
from experiments.models import load_source
from lowbit_jax.ptq.job import QuantizeConfig, quantize
from lowbit_jax.reporting.report import markdown_table

_CONFIGS = flags.DEFINE_list(
    "configs", ["ptq_rtn.py", "ptq_gptq.py", "ptq_awq.py", "ptq_autoround.py"], "Cards."
)
_SCHEMES = flags.DEFINE_multi_string(
    "scheme", ["w4a16_asym", "w3a16_asym", "w2a16_asym"], "A preset, or rules pattern=preset;..."
)
_MODEL = flags.DEFINE_string("model", "runs/float", "As --config.model.path.")
_TRAIN = flags.DEFINE_string("text_train", "stdlib", "As --config.calibration.source.")
_VALID = flags.DEFINE_string("text_valid", "stdlib", "As --config.evaluation.source.")
_SEPARATOR = flags.DEFINE_string("separator", "", "Where text files are cut into documents.")
_DOCUMENTS = flags.DEFINE_integer("documents", 0, "As --config.calibration.documents.")
_SET = flags.DEFINE_multi_string("set", [], "PATH=VALUE: sets a field of every config, as JSON.")
_OUT = flags.DEFINE_string("out", "runs/ptq_study", "Folder of all runs and of study.md.")


def study(configs: dict[str, QuantizeConfig], schemes: Sequence[str], model: str, out: Path) -> str:
    """Runs what is missing and returns the table as Markdown.

    Args:
        configs: A name for each card and its config.
        schemes: Presets or rules.
        model: Path of the float model.
        out: Folder of all runs.
    """
    source = None
    for scheme in schemes:
        for name, config in configs.items():
            workdir = run_folder(out, name, scheme)
            if (workdir / "summary.json").exists():
                continue
            source = source or load_source(model)
            field = "rules" if "=" in scheme else "scheme"
            quantize(config.replace({field: scheme}), source, workdir, console=Console(quiet=True))
            text = table(list(configs), schemes, out)
            (out / "study.md").write_text(text)
            print(text, flush=True)
    return table(list(configs), schemes, out)


def run_folder(out: Path, name: str, scheme: str) -> Path:
    """The folder of one run: the scheme's letters and digits, and the config's name."""
    slug = "".join(c if c.isalnum() or c == "_" else "-" for c in scheme).strip("-")
    return out / slug / name


def table(names: Sequence[str], schemes: Sequence[str], out: Path) -> str:
    """Increase of the loss (and seconds) of every finished run."""
    rows = []
    for name in names:
        cells = [_cell(run_folder(out, name, scheme) / "summary.json") for scheme in schemes]
        rows.append((name, *cells))
    return "\n".join(markdown_table(("config", *schemes), rows)) + "\n"


def _cell(file: Path) -> str:
    if not file.exists():
        return ""
    summary: dict[str, Any] = json.loads(file.read_text())
    increase = summary["packed"]["nll"] - summary["float"]["nll"]
    return f"{increase:+.4f} ({summary['seconds']:.0f} s)"


def main(argv: Sequence[str]) -> None:
    """Runs the study that the flags describe."""
    del argv
    changes: dict[str, Any] = {
        "model.path": _MODEL.value,
        "calibration.source": _TRAIN.value,
        "calibration.separator": _SEPARATOR.value,
        "calibration.documents": _DOCUMENTS.value,
        "evaluation.source": _VALID.value,
        "evaluation.separator": _SEPARATOR.value,
    }
    for item in _SET.value:
        path, _, value = item.partition("=")
        changes[path] = json.loads(value)
    configs = {Path(name).stem: config_files.load(name).replace(changes) for name in _CONFIGS.value}
    out = Path(_OUT.value)
    out.mkdir(parents=True, exist_ok=True)
    print(study(configs, _SCHEMES.value, _MODEL.value, out))


if __name__ == "__main__":
    runtime.run(main)
