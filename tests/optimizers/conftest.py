"""A language model that compiles in no time."""

import jax
import pytest
from flax import nnx


class Toy(nnx.Module):
    """A kernel of each kind that a rule may name."""

    def __init__(self, rngs):
        self.embed = nnx.Embed(16, 16, rngs=rngs)
        self.up = nnx.Linear(16, 32, rngs=rngs)
        self.down = nnx.Linear(32, 16, rngs=rngs)

    def __call__(self, tokens):
        x = self.embed(tokens)
        return x + self.down(jax.nn.silu(self.up(x)))


@pytest.fixture
def toy():
    """`toy()`: the same weights every time."""
    return lambda: Toy(nnx.Rngs(0))
