"""A tiny run: a few thousand weights on a made-up text, so that a step takes a millisecond."""

import io
import random

import jax
import pytest
from flax import nnx
from rich.console import Console

from lowbit_jax.training.config import DataConfig, ModelConfig, OptimConfig, TrainConfig


@pytest.fixture(scope="session")
def text_file(tmp_path_factory):
    words = ["low", "bit", "scale", "code", "word", "float", "grid", "\n"]
    text = " ".join(random.Random(0).choices(words, k=4000))
    path = tmp_path_factory.mktemp("text") / "words.txt"
    path.write_text(text)
    return path


@pytest.fixture
def tiny(text_file):
    """12 steps; log, evaluation and checkpoint points at different steps."""
    return TrainConfig(
        name="tiny",
        steps=12,
        batch=8,
        length=16,
        log_every=3,
        eval_every=5,
        eval_batches=1,
        final_batches=2,
        checkpoint_every=4,
        sample_prompt="low ",
        sample_length=8,
        model=ModelConfig(dim=32, layers=1, heads=2, kv_heads=1, ffn_dim=32, max_length=32),
        data=DataConfig(source=f"text:{text_file}"),
        optim=OptimConfig(lr=1e-2, warmup=2),
    )


@pytest.fixture
def quiet():
    """A console that is no terminal."""
    return Console(file=io.StringIO(), width=100)


class Toy(nnx.Module):
    """A language model with a kernel of each kind that compiles much faster than a decoder."""

    def __init__(self, rngs, dropout=0.0):
        self.embed = nnx.Embed(16, 16, rngs=rngs)
        self.up = nnx.Linear(16, 32, rngs=rngs)
        self.down = nnx.Linear(32, 16, rngs=rngs)
        self.dropout = nnx.Dropout(dropout, rngs=rngs) if dropout else None

    def __call__(self, tokens):
        x = self.embed(tokens)
        x = x + self.down(jax.nn.silu(self.up(x)))
        return x if self.dropout is None else self.dropout(x)


@pytest.fixture(scope="session")
def toy():
    """`toy(dropout)`: the same weights every time."""
    return lambda dropout=0.0: Toy(nnx.Rngs(0), dropout)
