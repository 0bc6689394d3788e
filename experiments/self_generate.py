"""Text that a float model writes itself, to train its quantized student on (LLM-QAT).

    python -m experiments.self_generate --checkpoint runs/float --out generated.txt
    python -m experiments.train --config qat_ternary.py \
        --config.data.source=text:generated.txt --config.data.tokenizer=... \
        --config.init_from=runs/float --config.distill.teacher=runs/float --config.distill.weight=1

One document after another, the checkpoint's separator between them. The student's tokenizer must be
the teacher's: a tokenizer that was trained on other text (`train:SIZE`) is another vocabulary.
"""

from collections.abc import Sequence
from pathlib import Path

import jax
from absl import flags
from rich.progress import track

from experiments import runtime
from lowbit_jax.generation.self_generated import generated_documents
from lowbit_jax.training.runs import load_checkpoint


def main(argv: Sequence[str]) -> None:
    """Generates."""
    del argv
    write(
        flags.FLAGS.checkpoint,
        Path(flags.FLAGS.out),
        documents=flags.FLAGS.documents,
        length=flags.FLAGS.length,
        greedy=flags.FLAGS.greedy,
        batch=flags.FLAGS.batch,
        seed=flags.FLAGS.seed,
    )


def write(
    checkpoint: str, out: Path, *, documents: int, length: int, greedy: int, batch: int, seed: int
) -> None:
    """Writes `out`, which appears when it is whole.

    Raises:
        ValueError: `out` exists, the checkpoint has no tokenizer, or a number that does not fit the
            model.
    """
    if out.exists():
        raise ValueError(f"--out={out}: exists. Name a new file, or remove this one.")
    loaded = load_checkpoint(checkpoint)
    separator = loaded.metadata.get("separator", "\n\n")
    texts = generated_documents(
        loaded.model,
        loaded.tokenizer(),
        documents,
        length or loaded.model.config.max_length,
        key=jax.random.key(seed),
        greedy=greedy,
        batch=batch,
    )
    unfinished = out.with_name(f"{out.name}.unfinished")
    shown = track(texts, description="writing", total=documents)
    with unfinished.open("w", encoding="utf-8", newline="") as file:
        for text in shown:
            file.write(text + separator)
    unfinished.replace(out)
    print(f"{out}: {documents} documents. Train on it with --config.data.source=text:{out}")


if __name__ == "__main__":
    flags.DEFINE_string(
        "checkpoint", None, "The teacher: a float run's folder, or a checkpoint.", required=True
    )
    flags.DEFINE_string("out", None, "The text file to write; it must be new.", required=True)
    flags.DEFINE_integer("documents", 1000, "How many.", lower_bound=1)
    flags.DEFINE_integer(
        "length", 0, "Tokens of each; 0: the model's whole context.", lower_bound=0
    )
    flags.DEFINE_integer(
        "greedy", 4, "The most likely tokens that follow the random first one.", lower_bound=1
    )
    flags.DEFINE_integer("batch", 32, "Documents written at once.", lower_bound=1)
    flags.DEFINE_integer("seed", 0, "Of the first tokens and of the drawing.")
    runtime.run(main)
