"""A float model from wherever it lies: GGUF, Hugging Face folder, or our own checkpoint."""

from pathlib import Path

from lowbit_jax import interop
from lowbit_jax.checkpoint.manifest import FILE as MANIFEST
from lowbit_jax.ptq.job import Source
from lowbit_jax.training.runs import load_checkpoint

_TRAIN = {"runs/float": "float.py", "runs/float_smoke": "float.py:smoke"}


def load_source(path: str | Path) -> Source:
    """The model at `path`, with its tokenizer.

    Raises:
        ValueError: Nothing there, no model, or a model without a tokenizer.
        NotImplementedError: An architecture that is not known here.
    """
    folder = Path(path)
    if not folder.exists():
        command = _TRAIN.get(folder.as_posix())
        how = (
            f"train it with: python -m experiments.train --config {command}; or " if command else ""
        )
        raise ValueError(
            f"model.path={path}: there is no such file or folder; {how}give "
            "--config.model.path=PATH of a GGUF file, a Hugging Face folder, or a run's folder."
        )
    if _is_ours(folder):
        loaded = load_checkpoint(folder)
        length = int(loaded.metadata.get("length", 0))
        origin = {"path": str(path), "format": "lowbit_jax"}
        return Source(loaded.model, loaded.tokenizer(), length, origin)
    found = interop.load_model(folder)
    if found.tokenizer is None:
        raise ValueError(
            f"model.path={path}: has no tokenizer, so that no text can be read. Use a GGUF file "
            "with one, or put its tokenizer.json into the folder."
        )
    return Source(found.model, found.tokenizer, 0, dict(found.source))


def _is_ours(folder: Path) -> bool:
    """Whether it is a checkpoint or a run of ours, finished or not; all have a config.json."""
    if (folder / MANIFEST).is_file() or (folder / "packed" / MANIFEST).is_file():
        return True
    foreign = any(folder.glob("*.safetensors*")) if folder.is_dir() else True
    return not foreign
