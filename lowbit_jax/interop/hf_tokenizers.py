"""The tokenizer of a Hugging Face folder, read and written."""

import json
from pathlib import Path
from typing import Any

import tokenizers

from lowbit_jax.data.tokenizers import ByteTokenizer, SubwordTokenizer, Tokenizer
from lowbit_jax.interop.fields import Fields
from lowbit_jax.interop.huggingface import read_config

FILE = "tokenizer.json"
_OPTIONS = "tokenizer_config.json"


def load_tokenizer(folder: Path) -> SubwordTokenizer | None:
    """The folder's tokenizer.json; None if it has none.

    `bos` is the token that its own post-processor puts in front of a text: None for models, such as
    Qwen, that name one and were trained without. `eos` is the one that ends a text.

    Raises: ValueError: A file is damaged.
    """
    path = folder / FILE
    if not path.is_file():
        return None
    try:
        definition = path.read_bytes().decode()
        plain = SubwordTokenizer(definition)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error
    engine = tokenizers.Tokenizer.from_str(definition)
    options = read_config(folder, _OPTIONS) if (folder / _OPTIONS).is_file() else Fields({}, "")
    config = read_config(folder)
    numbers = {
        name: _number(engine, options, f"{name}_token", config, f"{name}_token_id", plain.vocab)
        for name in ("bos", "eos")
    }
    marked = options.flag("add_bos_token", None)
    if marked is None:
        marked = engine.encode("").ids[:1] == [numbers["bos"]]
    return SubwordTokenizer(definition, bos=numbers["bos"] if marked else None, eos=numbers["eos"])


def write_tokenizer(folder: Path, tokenizer: Tokenizer | None) -> dict[str, Any]:
    """Writes the files of a tokenizer; returns what config.json says of it.

    Raises: NotImplementedError: A kind that tokenizer.json cannot describe.
    """
    if tokenizer is None:
        return {}
    subword = as_subword(tokenizer)
    engine = tokenizers.Tokenizer.from_str(subword.definition)
    ends = {name: getattr(subword, name) for name in ("bos", "eos")}
    options: dict[str, Any] = {
        f"{name}_token": engine.id_to_token(number)
        for name, number in ends.items()
        if number is not None
    }
    options["add_bos_token"] = subword.bos is not None
    options["tokenizer_class"] = "PreTrainedTokenizerFast"
    (folder / FILE).write_text(subword.definition, "utf-8")
    (folder / _OPTIONS).write_text(json.dumps(options, indent=2) + "\n")
    return {f"{name}_token_id": number for name, number in ends.items() if number is not None}


def as_subword(tokenizer: Tokenizer) -> SubwordTokenizer:
    """The tokenizer as one of the `tokenizers` library: bytes become a BPE without merges.

    Raises: NotImplementedError: It is of another kind.
    """
    match tokenizer:
        case SubwordTokenizer():
            return tokenizer
        case ByteTokenizer():
            numbers = {character: byte for byte, character in enumerate(byte_characters())}
            engine = tokenizers.Tokenizer(tokenizers.models.BPE(numbers, []))
            engine.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
            engine.decoder = tokenizers.decoders.ByteLevel()
            return SubwordTokenizer(engine.to_str())
    raise NotImplementedError(
        f"export: a {type(tokenizer).__name__} has no tokenizer.json. Export without a tokenizer."
    )


def byte_characters() -> list[str]:
    """The character that stands for each byte in byte-level vocabularies, GPT-2's choice.

    Printable ones stand for themselves, the others for the characters from U+0100 on, in order.
    """
    printable = {*range(33, 127), *range(161, 173), *range(174, 256)}
    others = iter(range(256, 512))
    return [chr(byte if byte in printable else next(others)) for byte in range(256)]


def _number(
    engine: tokenizers.Tokenizer,
    options: Fields,
    token: str,
    config: Fields,
    number: str,
    vocab: int,
) -> int | None:
    """A token's number: of its text in the tokenizer's options, or else from config.json."""
    match options.values.get(token):
        case str(text) | {"content": str(text)}:
            return engine.token_to_id(text)
    match config.values.get(number):
        case int(found) | [int(found), *_] if 0 <= found < vocab:
            return found
    return None
