"""One door for all files: `load_model(path)` decides by what the path is."""

import dataclasses
import warnings
from pathlib import Path
from typing import Any, Final

import tokenizers
from flax import nnx

from lowbit_jax.data.tokenizers import SubwordTokenizer, Tokenizer
from lowbit_jax.interop import gguf, gguf_models, huggingface, torch_models, torch_pickle
from lowbit_jax.interop.gguf_tokenizers import tokenizer_of
from lowbit_jax.interop.hf_tokenizers import load_tokenizer
from lowbit_jax.interop.methods import Weights

_KINDS: Final = (
    "a GGUF file, a Hugging Face folder (config.json with 'architectures', safetensors), or a "
    "torch file of a CIFAR ResNet"
)
_OWN: Final = "manifest.json"  # of lowbit_jax.checkpoint


@dataclasses.dataclass(frozen=True)
class Imported:
    """What was found at a path.

    model: Of a registered family, in evaluation mode; float32 but for packed layers.
    tokenizer: None where there is none.
    source: Where it came from, JSON-able: "path", "format" ("gguf", "huggingface" or "torch") and
        "architecture".
    """

    model: nnx.Module
    tokenizer: Tokenizer | None
    source: dict[str, Any]


def load_model(path: str | Path, *, weights: Weights = "float") -> Imported:
    """Loads a model of another program, and its tokenizer.

    Args:
        path: A GGUF file, a folder as transformers writes them, or a torch file of a CIFAR ResNet.
        weights: What quantized tensors become: "float" dequantizes them; "packed" keeps their codes
            and scales as they are, in packed layers, and never makes the dense kernel.
    Raises:
        FileNotFoundError: Nothing is there.
        ValueError: It is none of these, or damaged: truncated, or its parts contradict one another.
        NotImplementedError: It is sound, and of an architecture, with an option or in a number
            format that is not known here.
    """
    path = Path(path).expanduser()
    if not path.exists():
        raise FileNotFoundError(f"{path}: nothing is there; a model would be {_KINDS}.")
    if path.is_dir():
        return _folder(path, weights)
    with path.open("rb") as file:
        begin = file.read(len(torch_pickle.LEGACY))
    if begin.startswith(gguf.MAGIC):
        opened = gguf.GGUFFile(path)
        architecture = gguf_models.architecture_of(opened)
        tokenizer = tokenizer_of(opened.metadata, str(path))
        model = gguf_models.load_decoder(opened, weights)
        if tokenizer is not None and tokenizer.vocab > model.config.vocab:
            raise ValueError(
                f"{path}: the tokenizer has {tokenizer.vocab} tokens, and the embedding only "
                f"{model.config.vocab} rows. The file is damaged."
            )
        return Imported(model, tokenizer, _source(path, "gguf", architecture))
    if begin.startswith((torch_pickle.LEGACY, torch_pickle.ZIP)):
        return Imported(torch_models.load_resnet(path), None, _source(path, "torch", "resnet"))
    hint = " Pass the folder that it lies in." if path.suffix == ".safetensors" else ""
    raise ValueError(f"{path}: begins with {begin[:8]!r} and is not {_KINDS}.{hint}")


def _folder(path: Path, weights: Weights) -> Imported:
    if (path / _OWN).is_file():
        raise ValueError(
            f"{path}: a checkpoint of lowbit_jax; lowbit_jax.checkpoint.load reads it."
        )
    if not (path / huggingface.CONFIG).is_file():
        raise ValueError(f"{path}: a folder without {huggingface.CONFIG}; a model is {_KINDS}.")
    model, architecture = huggingface.load_decoder(path, weights)
    tokenizer = load_tokenizer(path)
    if tokenizer is not None:
        _check_vocabulary(path, tokenizer, model.config.vocab)
    return Imported(model, tokenizer, _source(path, "huggingface", architecture))


def _check_vocabulary(path: Path, tokenizer: SubwordTokenizer, rows: int) -> None:
    """Raises ValueError for tokens of text without an embedding, warns of added ones.

    Published models of text keep marks of their siblings that see images (Gemma 3's).
    """
    engine = tokenizers.Tokenizer.from_str(tokenizer.definition)
    texts = max(engine.get_vocab(with_added_tokens=False).values(), default=-1) + 1
    if texts > rows:
        raise ValueError(
            f"{path}: the tokenizer has {texts} tokens, and the embedding only {rows} rows: they "
            "do not belong together."
        )
    if tokenizer.vocab > rows:
        warnings.warn(
            f"{path}: the embedding has no rows for the added tokens of the tokenizer from {rows} "
            f"to {tokenizer.vocab - 1}. Texts that spell one cannot be read by the model.",
            stacklevel=3,
        )


def _source(path: Path, kind: str, architecture: str) -> dict[str, Any]:
    return {"path": str(path), "format": kind, "architecture": architecture}
