"""From a config to what a run needs: mesh, text, model, teacher. Nothing is written here."""

import dataclasses
from typing import Any

import jax
import numpy as np
from flax import nnx
from jax.sharding import Mesh

import lowbit_jax as lb
from lowbit_jax.data import Corpus, TokenBatches, Tokenizer, load_corpus, make_tokenizer, tokenize
from lowbit_jax.models import build
from lowbit_jax.training.config import TrainConfig
from lowbit_jax.training.distill import Teacher
from lowbit_jax.training.mesh import check_batch, make_mesh
from lowbit_jax.training.runs import load_checkpoint
from lowbit_jax.training.validation import decoder_config, validate


@dataclasses.dataclass(frozen=True)
class Text:
    """The corpus of a run, as tokens; `batches[step]` is what step `step` (from 0) trains on."""

    corpus: Corpus
    tokenizer: Tokenizer
    batches: TokenBatches
    valid: np.ndarray

    def valid_part(self, batches: int, config: TrainConfig) -> np.ndarray:
        """Validation text for `batches` batches; 0, or more than there are: all of it.

        That many stretches, evenly over the split: its first documents alone would stand for their
        folder only.
        """
        stretch = config.batch * config.length
        available = (len(self.valid) - 1) // stretch
        if not 0 < batches < available:
            return self.valid
        starts = np.arange(batches) * available // batches * stretch
        parts = [self.valid[start : start + stretch] for start in starts]
        end = starts[-1] + stretch
        return np.concatenate([*parts, self.valid[end : end + 1]])  # the last target


def check(config: TrainConfig) -> Mesh:
    """Refuses what can be seen to be wrong without reading any text; returns the mesh."""
    validate(config)
    mesh = make_mesh(config.mesh)
    check_batch(config, mesh)
    lb.Recipe.from_string(config.recipe)
    return mesh


def load_text(config: TrainConfig) -> Text:
    """Reads and tokenizes the corpus.

    Raises: ValueError, OSError: from `lowbit_jax.data`, as they are.
    """
    data = config.data
    corpus = load_corpus(data.source, separator=data.separator, valid_fraction=data.valid_fraction)
    tokenizer = make_tokenizer(data.tokenizer, corpus)
    batches = TokenBatches(
        tokenize(corpus, tokenizer, split="train"),
        batch=config.batch,
        length=config.length,
        seed=config.seed,
        process_index=jax.process_index(),
        process_count=jax.process_count(),
    )
    return Text(corpus, tokenizer, batches, tokenize(corpus, tokenizer, split="valid"))


def build_model(config: TrainConfig, vocab: int) -> nnx.Module:
    """The model before its first step: initialized or loaded from `init_from`, then quantized.

    In this order, so that learned scales start from the weights that are trained.
    """
    sizes = dataclasses.asdict(decoder_config(config, vocab))
    model = build("decoder", sizes, rngs=nnx.Rngs(config.seed))
    if config.init_from:
        _copy_weights(load_float(config.init_from, "init_from"), model, config.init_from)
    recipe = lb.Recipe.from_string(config.recipe)
    return model if recipe is None else lb.quantize_model(model, recipe)


def load_teacher(config: TrainConfig, vocab: int) -> Teacher | None:
    """The teacher that the config names; None without one.

    Raises: ValueError: Another vocabulary, or a context shorter than the training windows.
    """
    distill = config.distill
    if not distill.teacher:
        return None
    model = load_float(distill.teacher, "distill.teacher")
    has = model.config
    if has.vocab != vocab or has.max_length < config.length:
        raise ValueError(
            f"distill.teacher={distill.teacher}: vocabulary {has.vocab}, context "
            f"{has.max_length}; this run needs "
            f"vocabulary {vocab} and a context of at least {config.length}. Use a teacher trained "
            "with the same tokenizer."
        )
    return Teacher.of(model, temperature=distill.temperature, weight=distill.weight)


def load_float(path: str, field: str) -> Any:
    """The float model of a checkpoint, which the config names in `field`.

    Raises: ValueError: It is quantized.
    """
    model = load_checkpoint(path).model
    if quantized := [str(layer) for layer, _ in lb.quantized_layers(model)]:
        raise ValueError(
            f"{field}={path}: holds a quantized model ({len(quantized)} layers, first "
            f"{quantized[0]}); "
            "a float checkpoint is needed, such as a run of --config float.py."
        )
    return model


def _copy_weights(source: nnx.Module, target: nnx.Module, path: str) -> None:
    found, wanted = (dict(nnx.to_flat_state(nnx.state(m, nnx.Param))) for m in (source, target))
    shapes = [{k: v[...].shape for k, v in flat.items()} for flat in (found, wanted)]
    odd = [k for k in wanted | found if shapes[0].get(k) != shapes[1].get(k)]
    if odd:
        shown = "; ".join(
            f"{'/'.join(map(str, k))}: {shapes[0].get(k, 'absent')} there, "
            f"{shapes[1].get(k, 'absent')} here"
            for k in odd[:3]
        )
        raise ValueError(
            f"init_from={path}: {len(odd)} parameters do not fit this config's model ({shown}). "
            "Set --config.model and --config.data.tokenizer to those of that run (see its "
            "config.json)."
        )
    for key, leaf in wanted.items():
        leaf[...] = found[key][...]
