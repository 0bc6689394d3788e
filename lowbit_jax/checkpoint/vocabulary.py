"""Whether a checkpoint's tokenizer belongs to its model."""

from typing import Any

from etils import epath

from lowbit_jax.data.tokenizers import tokenizer_from_json


def check_tokenizer(path: epath.Path, manifest: dict[str, Any]) -> None:
    """Raises ValueError for a tokenizer that has tokens which the model has no embedding for.

    Fewer tokens than embeddings are fine: vocabularies are padded.
    """
    # In schema 1 it stood among the metadata.
    tokenizer = manifest["tokenizer"] or manifest["metadata"].get("tokenizer")
    vocab = (manifest["config"] or {}).get("vocab")
    if not isinstance(tokenizer, dict) or not isinstance(vocab, int):
        return
    try:
        tokens = tokenizer_from_json(tokenizer).vocab
    except ValueError as error:
        raise ValueError(f"{path}: the tokenizer cannot be read: {error}") from error
    if tokens > vocab:
        raise ValueError(
            f"{path}: the tokenizer has {tokens} tokens and the model embeddings for {vocab}: they "
            "do not belong together. Save the model with the tokenizer that it was trained with."
        )
