"""The tokenizer inside a GGUF file, as one of the `tokenizers` library.

"llama" is SentencePiece's BPE. Of all neighbours whose concatenation is a token, those that make
the one of highest score are merged, the leftmost first, until no such pair is left; a character
that is no token becomes its bytes. The library merges by rank instead, so every way to cut a token
into two others becomes a merge, ranked by the token's score. (That is another order only where two
ways to make one token overlap, as in "aaaa" from "aa" and "aaa".)

"gpt2" is byte-level BPE. The file lists the merges, and names the rule that cuts the text first.

Control tokens (begin, end, padding) are never made from text, whatever it says.
"""

from collections.abc import Iterator, Mapping
from typing import Any, Final, NoReturn

import numpy as np
import tokenizers
from tokenizers import decoders, models, normalizers, pre_tokenizers

from lowbit_jax.data.tokenizers import SubwordTokenizer

_NORMAL, _UNKNOWN, _USER = 1, 2, 4  # types of tokens
_SPACE: Final = "▁"
_NONE: Final = 2**32 - 1  # where a token's number stands: there is none

_CONTRACTIONS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)"
_WORDS = (
    _CONTRACTIONS
    + r"|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,%d}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)


def tokenizer_of(metadata: Mapping[str, Any], where: str) -> SubwordTokenizer | None:
    """The tokenizer that a file's metadata describe; None if they have none.

    Args:
        metadata: Of `GGUFFile`.
        where: The file, for messages.
    Raises:
        ValueError: Its parts do not fit one another.
        NotImplementedError: It is of a kind that is not known here.
    """
    kind = metadata.get("tokenizer.ggml.model")
    if kind is None:
        return None
    makers = {"llama": _sentencepiece, "gpt2": _byte_level}
    if kind not in makers:
        raise NotImplementedError(
            f"{where}: tokenizers of the kind {kind!r} are not supported. Kinds: {sorted(makers)}."
        )
    parts = _Parts(metadata, where)
    try:
        engine = makers[kind](parts)
    except (ValueError, NotImplementedError):
        raise
    except Exception as error:  # the library raises Exception itself, nothing narrower
        raise ValueError(f"{where}: the tokenizer is not consistent: {error}") from error
    engine.add_tokens(
        [
            tokenizers.AddedToken(token, normalized=False)
            for token, kind in zip(parts.tokens, parts.types, strict=True)
            if kind == _USER
        ]
    )
    return SubwordTokenizer(engine.to_str(), bos=parts.number("bos"), eos=parts.number("eos"))


class _Parts:
    """The fields of a tokenizer, checked."""

    def __init__(self, metadata: Mapping[str, Any], where: str):
        self.metadata, self.where = metadata, where
        self.tokens = self.strings("tokens")
        self.numbers = {token: i for i, token in enumerate(self.tokens)}
        if not self.tokens or len(self.numbers) != len(self.tokens):
            self.fail("tokens", f"has {len(self.tokens)} entries, {len(self.numbers)} different")
        types = self.array("token_type", "iu")
        self.types = [_NORMAL] * len(self.tokens) if types is None else types.tolist()

    def strings(self, name: str) -> list[str]:
        value = self.metadata.get(f"tokenizer.ggml.{name}")
        if not isinstance(value, list) or not all(isinstance(item, str) for item in value):
            self.fail(name, "is not an array of strings")
        return list(value)

    def array(self, name: str, kinds: str) -> np.ndarray | None:
        """One number a token."""
        value = self.metadata.get(f"tokenizer.ggml.{name}")
        if value is None:
            return None
        if not isinstance(value, np.ndarray) or value.dtype.kind not in kinds:
            self.fail(name, "is not an array of numbers of the right type")
        if len(value) != len(self.tokens):
            self.fail(name, f"has {len(value)} entries for {len(self.tokens)} tokens")
        return value

    def number(self, name: str) -> int | None:
        value = self.metadata.get(f"tokenizer.ggml.{name}_token_id", _NONE)
        if value == _NONE:
            return None
        if type(value) is not int or not 0 <= value < len(self.tokens):
            self.fail(f"{name}_token_id", f"is {value!r}, outside [0, {len(self.tokens)})")
        return value

    def fail(self, name: str, reason: str) -> NoReturn:
        raise ValueError(f"{self.where}: tokenizer.ggml.{name} {reason}. Convert the model again.")


def _sentencepiece(parts: _Parts) -> tokenizers.Tokenizer:
    scores = parts.array("scores", "f")
    if scores is None or not np.all(np.isfinite(scores)):
        parts.fail("scores", "is missing or has entries that are not finite")
    typed = list(zip(parts.tokens, parts.types, strict=True))
    pieces = {token for token, kind in typed if kind in (_NORMAL, _USER)}
    ranked = np.argsort(-scores, kind="stable")
    merges = [
        cut for i in ranked if parts.tokens[i] in pieces for cut in _cuts(parts.tokens[i], pieces)
    ]
    unknown = next((token for token, kind in typed if kind == _UNKNOWN), None)
    engine = tokenizers.Tokenizer(
        models.BPE(parts.numbers, merges, unk_token=unknown, fuse_unk=True, byte_fallback=True)
    )
    spaces: Any = normalizers.Replace(" ", _SPACE)
    back: list[Any] = [decoders.Replace(_SPACE, " "), decoders.ByteFallback(), decoders.Fuse()]
    if parts.metadata.get("tokenizer.ggml.add_space_prefix", True):
        spaces = normalizers.Sequence([normalizers.Prepend(_SPACE), spaces])
        back.append(decoders.Strip(" ", 1, 0))
    engine.normalizer = spaces
    engine.decoder = decoders.Sequence(back)
    return engine


def _cuts(token: str, pieces: set[str]) -> Iterator[tuple[str, str]]:
    """The ways to make `token` from two pieces."""
    for at in range(1, len(token)):
        if token[:at] in pieces and token[at:] in pieces:
            yield token[:at], token[at:]


def _byte_level(parts: _Parts) -> tokenizers.Tokenizer:
    merges = []
    for merge in parts.strings("merges"):
        first, _, second = merge.partition(" ")
        if not first or not second or " " in second:
            parts.fail("merges", f"has {merge!r}, which is not two tokens")
        merges.append((first, second))
    engine = tokenizers.Tokenizer(models.BPE(parts.numbers, merges))
    name = parts.metadata.get("tokenizer.ggml.pre", "gpt-2")
    engine.pre_tokenizer = pre_tokenizers.Sequence(cutting(name, parts.where))
    engine.decoder = decoders.ByteLevel()
    return engine


def cutting(name: Any, where: str) -> list[Any]:
    """How text is cut before the merges, which do not cross a cut.

    name: The rule's name in `tokenizer.ggml.pre`.
    where: The file, for messages.
    Raises: NotImplementedError: A rule that is not known here.
    """
    gpt2 = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
    if name in ("gpt-2", "default"):
        return [gpt2]
    if name == "smollm":
        return [pre_tokenizers.Digits(individual_digits=True), gpt2]
    digits = {"llama3": 3, "llama-v3": 3, "llama-bpe": 3, "qwen2": 1}
    if name not in digits:
        raise NotImplementedError(
            f"{where}: tokenizer.ggml.pre is {name!r}, a rule that is not known here. "
            f"Known: {['gpt-2', 'default', 'smollm', *digits]}."
        )
    words = tokenizers.Regex(_WORDS.replace("%d", str(digits[name])))
    bytes_only = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    return [pre_tokenizers.Split(words, "isolated"), bytes_only]
