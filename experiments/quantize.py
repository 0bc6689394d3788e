"""Quantizes a trained model as one config says, without retraining it, packs it and reports.

    python -m experiments.quantize --config ptq_gptq.py --config.model.path=PATH

PATH: a GGUF file, a Hugging Face folder, or a checkpoint of ours; default: what
`experiments.train --config float.py` left. Any field can be set: --config.scheme=w3a16_g32_asym. An
unfinished run in the workdir is resumed behind its last finished block.
"""

from collections.abc import Sequence
from pathlib import Path

from absl import app, flags
from ml_collections import config_flags

from experiments import config_files, runtime
from experiments.models import load_source
from lowbit_jax.ptq.job import QuantizeConfig, quantize

_CONFIG = config_flags.DEFINE_config_file(
    "config", help_string="A config's path, or its name in configs/; [:variant]."
)
_WORKDIR = flags.DEFINE_string("workdir", "", "Where this run writes; default runs/<config name>.")
_OVERWRITE = flags.DEFINE_bool(
    "overwrite", False, "Move a run that is in the workdir to <workdir>.1 and start anew."
)


def main(argv: Sequence[str]) -> None:
    """Quantizes."""
    del argv
    config = _CONFIG.value
    workdir = Path(_WORKDIR.value or Path("runs") / config.name)
    quantize(config, load_source(config.model.path), workdir, overwrite=_OVERWRITE.value)


def parse(argv: Sequence[str]) -> list[str]:
    """Flags, after the config's file, variant and fields have been checked."""
    wants_help = any(arg.lstrip("-").startswith("help") for arg in argv[1:])
    resolved = list(argv) if wants_help else config_files.resolve(argv, kind=QuantizeConfig)
    return app.parse_flags_with_usage(resolved)


if __name__ == "__main__":
    runtime.run(main, parse=parse)
