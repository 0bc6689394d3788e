"""The tokenizer of a Hugging Face folder."""

from pathlib import Path

import tokenizers

from lowbit_jax.data.tokenizers import SubwordTokenizer
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
