"""Trains what one config says, packs it and reports.

    python -m experiments.train --config qat_ternary.py

Any field can be set: --config.optim.lr=1e-3. Variants: qat_ternary.py:smoke, qat_ternary.py:pod.
An unfinished run in the workdir is resumed.
"""

from collections.abc import Sequence
from pathlib import Path

from absl import app, flags
from ml_collections import config_flags

from experiments import config_files, runtime
from lowbit_jax.training.loop import train

_CONFIG = config_flags.DEFINE_config_file(
    "config", help_string="A config's path, or its name in configs/; [:variant]."
)
_WORKDIR = flags.DEFINE_string("workdir", "", "Where this run writes; default runs/<config name>.")
_OVERWRITE = flags.DEFINE_bool(
    "overwrite", False, "Move a run that is in the workdir to <workdir>.1 and start anew."
)


def main(argv: Sequence[str]) -> None:
    """Trains."""
    del argv
    config = _CONFIG.value
    workdir = Path(_WORKDIR.value or Path("runs") / config.name)
    train(config, workdir, overwrite=_OVERWRITE.value)


def parse(argv: Sequence[str]) -> list[str]:
    """Flags, after the config's file, variant and fields have been checked."""
    wants_help = any(arg.lstrip("-").startswith("help") for arg in argv[1:])
    return app.parse_flags_with_usage(list(argv) if wants_help else config_files.resolve(argv))


if __name__ == "__main__":
    runtime.run(main, parse=parse)
