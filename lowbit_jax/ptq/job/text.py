"""The text of a run: what it calibrates on, and what it is evaluated on.

Calibration: documents behind the begin token (where the tokenizer has one), joined, and cut into
sequences of equal length. Evaluation: where the text is cut at a separator and the tokenizer has a
begin token, each document behind it from position 0, cut to the length; else windows of the joined
text, each token but the first predicted once.
"""

import dataclasses
import hashlib
from typing import Any

import numpy as np

from lowbit_jax.data import Tokenizer, valid_windows
from lowbit_jax.data.documents import document_windows, load_documents, stream
from lowbit_jax.evaluation.divergence import Batch, batches_of, check_vocabulary
from lowbit_jax.ptq.job.config import CalibrationConfig, EvaluationConfig

_MOST_WINDOWS = 512  # of a corpus whose validation split would take minutes


@dataclasses.dataclass(frozen=True)
class Texts:
    """Both texts as tokens.

    calibration: Batches [batch, length] of int32; the last may have fewer rows.
    evaluation: Batches of one shape; see `divergences`.
    calibration_sha256, evaluation_sha256: Fingerprints of the tokens.
    """

    calibration: list[np.ndarray]
    evaluation: list[Batch]
    calibration_sha256: str
    evaluation_sha256: str


def load_texts(
    calibration: CalibrationConfig,
    evaluation: EvaluationConfig,
    tokenizer: Tokenizer,
    *,
    vocab: int,
    max_length: int,
    default_length: int,
) -> Texts:
    """Reads, tokenizes and checks both texts.

    Args:
        calibration: What to calibrate on.
        evaluation: What to evaluate on.
        tokenizer: The model's.
        vocab: Size of the model's vocabulary.
        max_length: The model's longest context, in tokens.
        default_length: Where a config says 0.

    Raises:
        ValueError: Too few tokens, a length beyond the model's, tokens outside its vocabulary.
        OSError: No such text.
    """
    lengths = [config.length or default_length for config in (calibration, evaluation)]
    for name, length in zip(("calibration", "evaluation"), lengths, strict=True):
        if length > max_length:
            raise ValueError(
                f"{name}.length={length} is longer than the model's context of {max_length} tokens."
            )
    rows = _sequences(calibration, tokenizer, lengths[0])
    check_vocabulary(rows, vocab, "calibration")
    windows = _windows(evaluation, tokenizer, lengths[1])
    for tokens, _ in windows:
        check_vocabulary(tokens, vocab)
    step = calibration.batch
    return Texts(
        calibration=[rows[i : i + step] for i in range(0, len(rows), step)],
        evaluation=windows,
        calibration_sha256=_sha256([rows]),
        evaluation_sha256=_sha256([array for batch in windows for array in batch]),
    )


def _sequences(config: CalibrationConfig, tokenizer: Tokenizer, length: int) -> np.ndarray:
    documents = load_documents(config.source, config.separator, "train")
    chosen = documents[: config.documents] if config.documents else documents
    needed = config.sequences * length
    tokens = stream(chosen, tokenizer, config.separator or _between(config), at_most=needed)
    if len(tokens) < needed:
        raise ValueError(
            f"calibration.source={config.source}: {len(chosen):,} documents give {len(tokens):,} "
            f"tokens, and {config.sequences} sequences of {length} take {needed:,}. Use at most "
            f"--config.calibration.sequences={len(tokens) // length}, shorter ones, or more text."
        )
    return tokens.reshape(config.sequences, length)


def _windows(config: EvaluationConfig, tokenizer: Tokenizer, length: int) -> list[Batch]:
    documents = load_documents(config.source, config.separator, "valid")
    if config.separator and tokenizer.bos is not None:
        tokens, mask = document_windows(documents, tokenizer, length)
        return batches_of(*_chosen(tokens, mask, config), config.batch)
    text = stream(documents, tokenizer, config.separator or _between(config))
    if len(text) < 2:
        raise ValueError(f"evaluation.source={config.source}: holds no text to predict.")
    parts = list(valid_windows(text, length, 1))
    tokens, mask = (np.concatenate(arrays) for arrays in zip(*parts, strict=True))
    return batches_of(*_chosen(tokens, mask, config), config.batch)


def _between(config: CalibrationConfig | EvaluationConfig) -> str:
    """What stands behind a document where no separator is given; files are taken as they are."""
    return "" if config.source.startswith("text:") else "\n\n"


def _chosen(
    tokens: np.ndarray, mask: np.ndarray, config: EvaluationConfig
) -> tuple[np.ndarray, np.ndarray]:
    """At most `config.sequences` rows, evenly over the text."""
    limit = config.sequences or (
        len(tokens) if config.source.startswith("text:") else _MOST_WINDOWS
    )
    if limit >= len(tokens):
        return tokens, mask
    picked = np.arange(limit) * len(tokens) // limit
    return tokens[picked], mask[picked]


def _sha256(arrays: list[Any]) -> str:
    digest = hashlib.sha256()
    for array in arrays:
        digest.update(f"{array.dtype}{array.shape}".encode())
        digest.update(np.ascontiguousarray(array).tobytes())
    return digest.hexdigest()
