"""Writes a model as another program's file or folder.

    python -m experiments.export --checkpoint runs/ptq_gptq --format gptq --out exported

Codes are kept as they are. A table shows what the format could not hold: it is written dequantized
in float16, or refused with --strict.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from absl import flags
from rich.console import Console

from experiments import runtime
from lowbit_jax import interop
from lowbit_jax.checkpoint.manifest import FILE as MANIFEST
from lowbit_jax.training.runs import load_checkpoint

_CHECKPOINT = flags.DEFINE_string(
    "checkpoint",
    None,
    "A run's folder, its packed/, another checkpoint; or a GGUF file or Hugging Face folder.",
    required=True,
)
_FORMAT = flags.DEFINE_enum(
    "format", None, list(interop.FORMATS), "What is written.", required=True
)
_OUT = flags.DEFINE_string("out", None, "The folder, or GGUF file, to write.", required=True)
_STRICT = flags.DEFINE_bool(
    "strict", False, "Refuse, instead of writing a tensor dequantized that the format cannot hold."
)


def main(argv: Sequence[str]) -> None:
    """Exports."""
    del argv
    model, tokenizer = load(Path(_CHECKPOINT.value))
    rows = interop.export_model(
        model, _OUT.value, _FORMAT.value, tokenizer=tokenizer, strict=_STRICT.value
    )
    Console().print(interop.table_of(rows, Path(_OUT.value)))


def load(path: Path) -> tuple[Any, Any]:
    """The model at `path`, ours or another program's, and its tokenizer, if it has one."""
    ours = any((path / place).is_file() for place in (MANIFEST, f"packed/{MANIFEST}"))
    foreign = path.is_file() or (path.is_dir() and any(path.glob("*.safetensors*")))
    if ours or not foreign:
        loaded = load_checkpoint(path)
        known = "tokenizer" in loaded.metadata
        return loaded.model, loaded.tokenizer() if known else None
    found = interop.load_model(path, weights="packed")
    return found.model, found.tokenizer


if __name__ == "__main__":
    runtime.run(main)
