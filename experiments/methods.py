"""Prints the generated tables of the quantizer zoo, as Markdown.

python -m experiments.methods                       # method -> paper -> preset -> status
python -m experiments.methods --table distortion    # error of every scalar format; a minute
"""

from collections.abc import Sequence
from pathlib import Path

from absl import app, flags

from experiments import runtime
from lowbit_jax.reporting.distortion import distortion_table
from lowbit_jax.reporting.methods import methods_table

_TABLE = flags.DEFINE_enum("table", "methods", ["methods", "distortion"], "Which table.")
_SAMPLES = flags.DEFINE_integer("samples", 2**22, "Normal samples; a multiple of 32768.")
_OUT = flags.DEFINE_string("out", None, "A file to write; default: the terminal.")


def main(argv: Sequence[str]) -> None:
    """Writes one table."""
    if len(argv) > 1:
        raise app.UsageError(f"unexpected arguments: {argv[1:]}")
    if _TABLE.value == "methods":
        text = methods_table()
    else:
        text = distortion_table(samples=_SAMPLES.value)
    if _OUT.value is None:
        print(text, end="")
    else:
        Path(_OUT.value).write_text(text)


if __name__ == "__main__":
    runtime.run(main)
