"""A plain multilayer perceptron."""

import dataclasses
import itertools

from flax import nnx
from jaxtyping import Array, Float

from lowbit_jax.models.config import require_sizes
from lowbit_jax.models.registry import register


@dataclasses.dataclass(frozen=True)
class MLPConfig:
    """Sizes of an `MLP`.

    Attributes:
        in_features: Width of the input.
        hidden: Widths of the hidden layers, first to last; may be empty.
        out_features: Width of the output.
    Raises: ValueError: a size is not an integer of at least 1.
    """

    in_features: int
    hidden: tuple[int, ...]
    out_features: int

    def __post_init__(self):
        require_sizes("MLPConfig", **dataclasses.asdict(self))


@register("mlp")
class MLP(nnx.Module):
    """`head(relu(layers[-1](... relu(layers[0](x)))))`."""

    def __init__(self, config: MLPConfig, *, rngs: nnx.Rngs):
        self.config = config
        widths = (config.in_features, *config.hidden)
        self.layers = nnx.List(nnx.Linear(n, m, rngs=rngs) for n, m in itertools.pairwise(widths))
        self.head = nnx.Linear(widths[-1], config.out_features, rngs=rngs)

    def __call__(
        self, x: Float[Array, "*batch in_features"]
    ) -> Float[Array, "*batch out_features"]:
        """Applies the layers over the last axis."""
        for layer in self.layers:
            x = nnx.relu(layer(x))
        return self.head(x)
