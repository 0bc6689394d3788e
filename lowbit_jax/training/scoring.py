"""How well a saved model, float or packed, predicts a text."""

import dataclasses
import glob
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Int

from lowbit_jax.data import Tokenizer, load_corpus, tokenize
from lowbit_jax.evaluation.evaluate import evaluate
from lowbit_jax.training.runs import Loaded


@dataclasses.dataclass(frozen=True)
class Score:
    """An evaluation and what it was made on; `to_dict` is JSON."""

    checkpoint: str
    source: str
    nll: float
    bits_per_byte: float | None
    ppl: float
    tokens: int
    length: int

    def to_dict(self) -> dict[str, Any]:
        """The fields by name."""
        return dataclasses.asdict(self)

    def rows(self) -> list[tuple[str, str]]:
        """For a table."""
        bits = "unknown" if self.bits_per_byte is None else f"{self.bits_per_byte:.4f}"
        return [
            ("checkpoint", self.checkpoint),
            ("text", self.source),
            ("context length, tokens", f"{self.length:,}"),
            ("tokens predicted", f"{self.tokens:,}"),
            ("nats per token", f"{self.nll:.5f}"),
            ("bits per byte", bits),
            ("perplexity", f"{self.ppl:.3f}"),
        ]


def score(
    loaded: Loaded,
    *,
    source: str = "",
    length: int = 0,
    batch: int = 8,
    max_windows: int = 0,
    on_batch: Callable[[int, int], None] | None = None,
) -> Score:
    """Evaluates a checkpoint.

    Args:
        loaded: From `load_checkpoint`.
        source: "text:GLOB": all text of those files, joined by the separator; "stdlib" or
            "hf:...": their validation split; "": the validation split of the run that made the
            checkpoint.
        length: Context length, in tokens; 0: that of the training.
        batch: Windows at once.
        max_windows: Only so many windows; 0: all.
        on_batch: Called with (windows done, windows in all).
    """
    metadata = loaded.metadata
    run_data = metadata.get("config", {}).get("data", {})
    source = source or run_data.get("source", "stdlib")
    separator = metadata.get("separator", "\n\n")
    tokenizer = loaded.tokenizer()
    tokens = (
        _file_tokens(source.removeprefix("text:"), separator, tokenizer)
        if source.startswith("text:") and source != run_data.get("source")
        else tokenize(
            load_corpus(
                source,
                separator=separator,
                valid_fraction=run_data.get("valid_fraction", 0.05),
            ),
            tokenizer,
            split="valid",
        )
    )
    result = evaluate(
        loaded.model,
        tokens,
        length=length or metadata.get("length", loaded.model.config.max_length),
        batch=batch,
        byte_count=tokenizer.byte_count,
        max_windows=max_windows or None,
        on_batch=on_batch,
    )
    return Score(str(loaded.path), source, **dataclasses.asdict(result))


def _file_tokens(pattern: str, separator: str, tokenizer: Tokenizer) -> Int[np.ndarray, " n"]:
    paths = sorted(Path(p) for p in glob.glob(pattern, recursive=True) if Path(p).is_file())
    if not paths:
        raise ValueError(
            f"text:{pattern}: matches no file. Quote the pattern, so that the shell leaves it."
        )
    texts = []
    for path in paths:
        try:
            texts.append(path.read_text(encoding="utf-8"))
        except UnicodeDecodeError as error:
            raise ValueError(f"{path}: is not UTF-8 text ({error}).") from error
    return tokenizer.encode(separator.join(texts))
