"""How well a saved model, float or packed, predicts a text."""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

from lowbit_jax.data import Tokenizer, load_corpus, tokenize
from lowbit_jax.data.documents import document_windows, load_documents, read_files
from lowbit_jax.evaluation.divergence import batches_of, divergences
from lowbit_jax.evaluation.evaluate import Evaluation, bits_per_byte, evaluate
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
    separator: str = "",
    length: int = 0,
    batch: int = 8,
    max_windows: int = 0,
    on_batch: Callable[[int, int], None] | None = None,
) -> Score:
    """Evaluates a checkpoint.

    A model whose tokenizer has a begin token reads each document from its begin, cut to `length`,
    as it was trained to; the others read windows of the joined text.

    Args:
        loaded: From `load_checkpoint`.
        source: "text:GLOB": all text of those files, joined by the separator; "stdlib" or
            "hf:...": their validation split; "": what the run that made the checkpoint was
            evaluated on.
        separator: Between documents; "": that of the run.
        length: Context length, in tokens; 0: that of the training.
        batch: Windows at once.
        max_windows: Only so many windows; 0: all.
        on_batch: Called with (windows done, windows in all).
    """
    metadata = loaded.metadata
    config = metadata.get("config", {})
    run_data = config.get("data", {})
    own_source = (run_data or config.get("evaluation", {})).get("source", "stdlib")
    source = source or own_source
    separator = separator or metadata.get("separator", "\n\n")
    tokenizer = loaded.tokenizer()
    length = length or metadata.get("length", loaded.model.config.max_length)
    if tokenizer.bos is not None:
        documents = load_documents(source, separator, "valid")[: max_windows or None]
        measured = _by_document(loaded.model, documents, tokenizer, length, batch, on_batch)
        return Score(str(loaded.path), source, **dataclasses.asdict(measured))
    tokens = (
        tokenizer.encode(separator.join(read_files(source.removeprefix("text:"))))
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
        length=length,
        batch=batch,
        byte_count=tokenizer.byte_count,
        max_windows=max_windows or None,
        on_batch=on_batch,
    )
    return Score(str(loaded.path), source, **dataclasses.asdict(result))


def _by_document(
    model: Any,
    documents: Sequence[str],
    tokenizer: Tokenizer,
    length: int,
    batch: int,
    on_batch: Callable[[int, int], None] | None,
) -> Evaluation:
    rows = document_windows(documents, tokenizer, length)
    found = divergences({"model": model}, batches_of(*rows, batch), on_batch)["model"]
    pairs = zip(*rows, strict=True)
    text_bytes = sum(tokenizer.byte_count(tokens[1:][mask]) for tokens, mask in pairs)
    bits = bits_per_byte(found.nll, text_bytes / found.tokens)
    return Evaluation(found.nll, bits, found.ppl, found.tokens, length)
