"""A tokenizer as GGUF's metadata: the inverse of `gguf_tokenizers`.

A BPE with byte fallback becomes SentencePiece's kind, "llama", in which scores order the merges: a
token's score is minus the rank of the first merge that makes it. A byte-level BPE becomes "gpt2",
whose merges stand in the file, with the name of the rule that cuts the text.
"""

import json
import re
from collections.abc import Mapping
from typing import Any, Final

import numpy as np
import tokenizers
from tokenizers import pre_tokenizers

from lowbit_jax.data.tokenizers import Tokenizer
from lowbit_jax.interop.gguf_tokenizers import cutting
from lowbit_jax.interop.hf_tokenizers import as_subword

_NORMAL, _UNKNOWN, _CONTROL, _USER, _UNUSED, _BYTE = range(1, 7)  # types of tokens
_RULES: Final = ("gpt-2", "smollm", "llama-bpe", "qwen2")


def tokenizer_metadata(tokenizer: Tokenizer) -> dict[str, Any]:
    """The metadata `tokenizer.ggml.*`.

    Raises: NotImplementedError: A kind of tokenizer, or a rule of cutting, without a name here.
    """
    subword = as_subword(tokenizer)
    content = json.loads(subword.definition)
    model = content["model"]
    if model.get("type") != "BPE":
        raise NotImplementedError(
            f"export: GGUF holds BPE tokenizers here, and this is {model.get('type')!r}. Export "
            "without a tokenizer."
        )
    engine = tokenizers.Tokenizer.from_str(subword.definition)
    by_number = {number: token for token, number in engine.get_vocab().items()}
    tokens = [by_number[i] for i in range(subword.vocab) if i in by_number]
    if len(tokens) != subword.vocab:
        raise NotImplementedError(
            f"export: the vocabulary has {len(tokens)} tokens with numbers up to "
            f"{subword.vocab - 1}; GGUF lists them without gaps. Export without a tokenizer."
        )
    merges = [tuple(m.split(" ")) if isinstance(m, str) else tuple(m) for m in model["merges"]]
    added = {entry["content"]: entry["special"] for entry in content.get("added_tokens") or ()}
    if model.get("byte_fallback"):
        fields = _sentencepiece(tokens, merges, added, content)
    else:
        types = [_CONTROL if added.get(t) else _USER if t in added else _NORMAL for t in tokens]
        fields = {
            "model": "gpt2",
            "pre": _rule(engine),
            "token_type": np.array(types, np.int32),
            "merges": [" ".join(merge) for merge in merges],
        }
    fields["tokens"] = tokens
    for name in ("bos", "eos"):
        if getattr(subword, name) is not None:
            fields[f"{name}_token_id"] = getattr(subword, name)
    fields["add_bos_token"] = subword.bos is not None
    return {f"tokenizer.ggml.{name}": value for name, value in fields.items()}


def _sentencepiece(
    tokens: list[str],
    merges: list[tuple[str, ...]],
    added: Mapping[str, bool],
    content: Mapping[str, Any],
) -> dict[str, Any]:
    ranks: dict[str, int] = {}
    for merge in merges:
        ranks.setdefault("".join(merge), len(ranks))
    unknown = content["model"].get("unk_token")

    def kind(token: str) -> int:
        if token == unknown:
            return _UNKNOWN
        if token in added:
            return _CONTROL if added[token] else _USER
        if re.fullmatch(r"<0x[0-9A-F]{2}>", token):
            return _BYTE
        # What no merge makes is never made from text, but for single characters.
        return _NORMAL if token in ranks or len(token) == 1 else _CONTROL

    normalizer = json.dumps(content.get("normalizer"))
    fields: dict[str, Any] = {
        "model": "llama",
        "token_type": np.array([kind(token) for token in tokens], np.int32),
        "scores": np.array([-ranks.get(t, len(ranks)) for t in tokens], np.float32),
        "add_space_prefix": '"Prepend"' in normalizer,
    }
    if unknown in tokens:
        fields["unknown_token_id"] = tokens.index(unknown)
    return fields


def _rule(engine: tokenizers.Tokenizer) -> str:
    """The name of the rule that cuts the text as the tokenizer does."""
    mine = _described(engine.pre_tokenizer)
    for name in _RULES:
        if _described(pre_tokenizers.Sequence(cutting(name, ""))) == mine:
            return name
    raise NotImplementedError(
        "export: the tokenizer cuts text by a rule that has no name in GGUF here; known are "
        f"{list(_RULES)}. Export without a tokenizer."
    )


def _described(cutter: Any) -> list[Any]:
    """What a pre-tokenizer does, alike for one and a sequence of one; offsets are left out."""
    engine = tokenizers.Tokenizer(tokenizers.models.BPE())
    engine.pre_tokenizer = cutter
    content = json.loads(engine.to_str())["pre_tokenizer"]
    parts = content["pretokenizers"] if content["type"] == "Sequence" else [content]
    return [{k: v for k, v in part.items() if k != "trim_offsets"} for part in parts]
