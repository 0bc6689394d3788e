"""Tokenizers: text to token numbers and back, without loss.

Three kinds, named by a string (`make_tokenizer`): bytes as they are, a `tokenizers` file, and a
byte-level BPE trained on the corpus. A tokenizer turns into plain JSON and back, so a checkpoint
can carry the one its model was trained with.

Always: `decode(encode(text)) == text`, and `bos` is not among the tokens. Text that a vocabulary
cannot express is an error that shows the place, because its likelihood would be that of another
text and its bits per byte would mean nothing.
"""

import abc
import dataclasses
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any, final, override

import numpy as np
import tokenizers
from jaxtyping import Int32, Integer

from lowbit_jax.data.corpus import Corpus

_BYTES = 256


class Tokenizer(abc.ABC):
    """Text <-> token numbers in [0, vocab)."""

    @property
    @abc.abstractmethod
    def vocab(self) -> int:
        """One more than the largest token number: what a model's vocabulary must reach."""

    @property
    def bos(self) -> int | None:
        """The token that stands in front of every text of its model, if there is one."""
        return None

    @property
    def eos(self) -> int | None:
        """The token behind every text of its model, if there is one."""
        return None

    @abc.abstractmethod
    def encode_batch(self, texts: Sequence[str]) -> Integer[np.ndarray, " n"]:
        """The tokens of all `texts`, one after the other. Raises: see `encode`."""

    @abc.abstractmethod
    def decode(self, tokens: Integer[np.ndarray, " n"]) -> str:
        """The text; a character cut in half is U+FFFD, and `bos`, which is no text, is left out.

        Raises: ValueError: A token lies outside [0, vocab).
        """

    @abc.abstractmethod
    def byte_count(self, tokens: Integer[np.ndarray, " n"]) -> int:
        """UTF-8 bytes of the text that `tokens` stand for."""

    @abc.abstractmethod
    def to_json(self) -> dict[str, Any]:
        """Plain JSON values, from which `tokenizer_from_json` makes an equal tokenizer."""

    @final
    def encode(self, text: str) -> Int32[np.ndarray, " n"]:
        """The tokens of `text` (int32), without any that mark its begin or end.

        Raises: ValueError: The vocabulary does not cover the text.
        """
        return self.encode_batch([text]).astype(np.int32)


@final
@dataclasses.dataclass(frozen=True)
class ByteTokenizer(Tokenizer):
    """Each byte of the UTF-8 text is a token: 256 of them cover every text.

    Example:
        >>> ByteTokenizer().encode("é!").tolist()
        [195, 169, 33]
    """

    @property
    @override
    def vocab(self) -> int:
        return _BYTES

    @override
    def encode_batch(self, texts: Sequence[str]) -> Integer[np.ndarray, " n"]:
        return np.frombuffer("".join(texts).encode(), np.uint8)

    @override
    def decode(self, tokens: Integer[np.ndarray, " n"]) -> str:
        return _checked(tokens, self.vocab).astype(np.uint8).tobytes().decode(errors="replace")

    @override
    def byte_count(self, tokens: Integer[np.ndarray, " n"]) -> int:
        return len(tokens)

    @override
    def to_json(self) -> dict[str, Any]:
        return {"type": "bytes"}


@final
@dataclasses.dataclass(frozen=True)
class SubwordTokenizer(Tokenizer):
    """A `tokenizers.Tokenizer`, with nothing added to a text and nothing cut off it.

    definition: The content of its tokenizer.json. Padding and truncation in it are switched off.
    bos, eos: Numbers of the tokens that its model's texts begin and end with; None: there is none.
    """

    definition: str = dataclasses.field(repr=False)
    bos: int | None = None
    eos: int | None = None
    # Derived from the definition, to which equality and hash belong.
    _engine: Any = dataclasses.field(init=False, repr=False, compare=False)
    _vocab: int = dataclasses.field(init=False, repr=False, compare=False)

    def __post_init__(self):
        try:
            engine = tokenizers.Tokenizer.from_str(self.definition)
        except Exception as error:  # the library raises Exception itself, nothing narrower
            raise ValueError(
                f"not a tokenizer.json of the `tokenizers` library: {error}"
            ) from error
        engine.no_truncation()
        engine.no_padding()
        object.__setattr__(self, "_engine", engine)
        object.__setattr__(self, "_vocab", max(engine.get_vocab().values(), default=-1) + 1)
        for name in ("bos", "eos"):
            number = getattr(self, name)
            if number is not None and not (type(number) is int and 0 <= number < self._vocab):
                raise ValueError(
                    f"tokenizer: {name}={number!r} is no token of the vocabulary "
                    f"[0, {self._vocab})."
                )

    @property
    @override
    def vocab(self) -> int:
        # Not the number of tokens: a file may leave numbers out, and models index by the largest.
        return self._vocab

    @override
    def encode_batch(self, texts: Sequence[str]) -> Integer[np.ndarray, " n"]:
        encodings = self._engine.encode_batch_fast(list(texts), add_special_tokens=False)
        numbers = [encoding.ids for encoding in encodings]
        # `decode` leaves `bos` out, so that a text that spells it would not come back.
        kept = numbers
        if self.bos is not None:
            kept = [[number for number in own if number != self.bos] for own in numbers]
        decoded = self._engine.decode_batch(kept, skip_special_tokens=False)
        for text, back in zip(texts, decoded, strict=True):
            if text != back:
                raise ValueError(_lost_text(text, back))
        return np.concatenate([np.asarray(n, np.int32) for n in numbers] or [np.empty(0, np.int32)])

    @override
    def decode(self, tokens: Integer[np.ndarray, " n"]) -> str:
        tokens = _checked(tokens, self.vocab)
        if self.bos is None:
            return self._engine.decode(tokens.tolist(), skip_special_tokens=False)
        # Texts between marks are decoded apart: each may begin with a space that is none.
        texts = np.split(tokens, np.flatnonzero(tokens == self.bos))
        numbers = [text[text != self.bos].tolist() for text in texts]
        return "".join(self._engine.decode_batch(numbers, skip_special_tokens=False))

    @override
    def byte_count(self, tokens: Integer[np.ndarray, " n"]) -> int:
        """Exact but at the ends, where a character cut in half counts as the 3 bytes of U+FFFD."""
        return len(self.decode(tokens).encode())

    @override
    def to_json(self) -> dict[str, Any]:
        ends = {name: getattr(self, name) for name in ("bos", "eos")}
        given = {name: number for name, number in ends.items() if number is not None}
        return {"type": "tokenizers", "definition": self.definition} | given


def make_tokenizer(spec: str, corpus: Corpus | None = None) -> Tokenizer:
    """Makes the tokenizer that a string names.

    Args:
        spec: "bytes", "file:PATH" (a tokenizer.json) or "train:VOCAB" (a byte-level BPE of that
            many tokens).
        corpus: What "train" learns from: its training documents.
    Raises:
        ValueError: An unknown or incomplete spec, a file that is no tokenizer, or a corpus too
            small for VOCAB tokens.
        FileNotFoundError: No file at PATH.
    """
    kind, _, argument = spec.partition(":")
    if spec == "bytes":
        return ByteTokenizer()
    if kind == "file" and argument:
        try:
            return SubwordTokenizer(pathlib.Path(argument).expanduser().read_text("utf-8"))
        except FileNotFoundError as error:
            raise FileNotFoundError(f"tokenizer {spec!r}: no such file.") from error
        except ValueError as error:
            raise ValueError(f"tokenizer {spec!r}: {error}") from error
    if kind == "train" and argument.isdecimal():
        if corpus is None:
            raise ValueError(f"tokenizer {spec!r} learns from a corpus, and none was given.")
        return train_bpe(corpus, int(argument))
    raise ValueError(
        f"unknown tokenizer {spec!r}. Tokenizers: 'bytes', 'file:PATH' (a tokenizer.json), "
        "'train:VOCAB' (train:4096)."
    )


def train_bpe(corpus: Corpus, vocab: int) -> SubwordTokenizer:
    """Trains a byte-level BPE, the scheme of GPT-2, on the training documents.

    Equal corpora give equal tokenizers. All 256 bytes are tokens, so it covers every text. A
    separator that is not white space becomes one token, which generation can stop at.

    Raises: ValueError: `vocab` is below the tokens that must be there, or above what the corpus has
        pairs for.
    """
    special = [corpus.separator] if corpus.separator.strip() else []
    least = _BYTES + len(special)
    if vocab < least:
        raise ValueError(
            f"train:{vocab}: a byte-level vocabulary has at least {least} tokens ({_BYTES} bytes + "
            f"{len(special)} separator)."
        )
    engine = tokenizers.Tokenizer(tokenizers.models.BPE())
    engine.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    engine.decoder = tokenizers.decoders.ByteLevel()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=vocab,
        show_progress=False,
        special_tokens=special,
        initial_alphabet=sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet()),
    )
    engine.train_from_iterator(iter(corpus.train), trainer)
    tokenizer = SubwordTokenizer(engine.to_str())
    if tokenizer.vocab < vocab:
        raise ValueError(
            f"train:{vocab}: the training text of {corpus.name} yields only {tokenizer.vocab} "
            f"tokens. Use train:{tokenizer.vocab} or more text."
        )
    return tokenizer


def tokenizer_from_json(data: Mapping[str, Any]) -> Tokenizer:
    """The tokenizer that `Tokenizer.to_json` described. Raises: ValueError: It is no such thing."""
    match data:
        case {"type": "bytes"}:
            return ByteTokenizer()
        case {"type": "tokenizers", "definition": str(definition)}:
            return SubwordTokenizer(definition, bos=data.get("bos"), eos=data.get("eos"))
    raise ValueError(
        f"not a tokenizer: a mapping with type {data.get('type')!r} and keys {sorted(data)}. "
        "Types: 'bytes', 'tokenizers' (with 'definition')."
    )


def _checked(tokens: Integer[np.ndarray, " n"], vocab: int) -> Integer[np.ndarray, " n"]:
    """`tokens` as an array, if all lie in [0, vocab)."""
    tokens = np.asarray(tokens)
    wrong = tokens[(tokens < 0) | (tokens >= vocab)]
    if wrong.size:
        raise ValueError(f"token {wrong[0]} is outside the vocabulary [0, {vocab}).")
    return tokens


def _lost_text(text: str, back: str) -> str:
    """Shows where a text and what came back from its tokens part."""
    pairs = enumerate(zip(text, back, strict=False))
    at = next((i for i, (a, b) in pairs if a != b), min(len(text), len(back)))
    around = slice(max(0, at - 20), at + 20)
    return (
        f"the tokenizer's vocabulary does not cover the text: {text[around]!r} comes back as "
        f"{back[around]!r} (first difference at character {at}). Use a tokenizer that keeps all "
        "text: 'bytes', 'train:VOCAB', or a byte-level file without normalization."
    )
