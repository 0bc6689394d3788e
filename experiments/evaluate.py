"""How well a model predicts text.

python -m experiments.evaluate --checkpoint runs/qat_ternary --source 'text:*.md'
"""

import json
from collections.abc import Sequence

from absl import flags
from rich.console import Console
from rich.progress import Progress
from rich.table import Table

from experiments import runtime
from lowbit_jax.training.runs import load_checkpoint
from lowbit_jax.training.scoring import score

_CHECKPOINT = flags.DEFINE_string(
    "checkpoint", None, "A run's folder, its packed/, or another checkpoint.", required=True
)
_SOURCE = flags.DEFINE_string(
    "source", "", "text:GLOB, stdlib or hf:NAME; default: what the run was evaluated on."
)
_SEPARATOR = flags.DEFINE_string(
    "separator", "", "Between documents of text:GLOB; default: that of the run."
)
_LENGTH = flags.DEFINE_integer("length", 0, "Context length in tokens; default: the training's.")
_BATCH = flags.DEFINE_integer("batch", 8, "Windows at once.")
_MAX_WINDOWS = flags.DEFINE_integer("max_windows", 0, "Only so many windows; 0: all.")
_JSON = flags.DEFINE_bool("json", False, "Print one JSON object instead of a table.")


def main(argv: Sequence[str]) -> None:
    """Evaluates."""
    del argv
    loaded = load_checkpoint(_CHECKPOINT.value, prepare=True)
    sizes = {"length": _LENGTH.value, "batch": _BATCH.value, "max_windows": _MAX_WINDOWS.value}
    with Progress(console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task("evaluating", total=None)
        result = score(
            loaded,
            source=_SOURCE.value,
            separator=_SEPARATOR.value,
            on_batch=lambda done, total: bar.update(task, completed=done, total=total),
            **sizes,
        )
    if _JSON.value:
        print(json.dumps(result.to_dict()))
        return
    table = Table(show_header=False)
    for row in result.rows():
        table.add_row(*row)
    Console().print(table)


if __name__ == "__main__":
    runtime.run(main)
