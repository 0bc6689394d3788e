"""A plain multilayer perceptron, with or without batch normalization."""

import dataclasses
import itertools

from flax import nnx
from jaxtyping import Array, Float

from lowbit_jax.models.activation import ACTIVATIONS, require_activation
from lowbit_jax.models.config import require_sizes
from lowbit_jax.models.identity import Identity
from lowbit_jax.models.registry import register


@dataclasses.dataclass(frozen=True)
class MLPConfig:
    """Sizes of an `MLP`.

    Attributes:
        in_features: Width of the input.
        hidden: Widths of the hidden layers, first to last; may be empty.
        out_features: Width of the output.
        norm: Batch normalization behind every layer, the head included, as the binary MLPs of
            arXiv:1511.00363 and arXiv:1602.02830 have it; layers then have no bias.
        activation: "relu", or "hard_tanh" where the layers take the signs of their inputs.
    Raises: ValueError: a size is not an integer of at least 1, or an unknown activation.
    """

    in_features: int
    hidden: tuple[int, ...]
    out_features: int
    norm: bool = False
    activation: str = "relu"

    def __post_init__(self):
        require_sizes(
            "MLPConfig",
            in_features=self.in_features,
            hidden=self.hidden,
            out_features=self.out_features,
        )
        if not isinstance(self.norm, bool):
            raise ValueError(f"MLPConfig: norm={self.norm!r} must be True or False.")
        require_activation("MLPConfig", self.activation)


@register("mlp")
class MLP(nnx.Module):
    """`head(f(layers[-1](... f(layers[0](x)))))`, with norms: f(x) = activation(norm(x)).

    `train()` and `eval()` choose the statistics of the norms.
    """

    def __init__(self, config: MLPConfig, *, rngs: nnx.Rngs):
        self.config = config
        widths = (config.in_features, *config.hidden)
        bias = not config.norm  # a norm subtracts the mean, and has a bias of its own
        self.layers = nnx.List(
            nnx.Linear(n, m, use_bias=bias, rngs=rngs) for n, m in itertools.pairwise(widths)
        )
        self.norms = nnx.List(_norm(m, config.norm, rngs=rngs) for m in config.hidden)
        self.head = nnx.Linear(widths[-1], config.out_features, use_bias=bias, rngs=rngs)
        self.head_norm = _norm(config.out_features, config.norm, rngs=rngs)

    def __call__(
        self, x: Float[Array, "*batch in_features"]
    ) -> Float[Array, "*batch out_features"]:
        """Applies the layers over the last axis."""
        activation = ACTIVATIONS[self.config.activation]
        for layer, norm in zip(self.layers, self.norms, strict=True):
            x = activation(norm(layer(x)))
        return self.head_norm(self.head(x))


def _norm(features: int, used: bool, *, rngs: nnx.Rngs) -> nnx.Module:
    return nnx.BatchNorm(features, momentum=0.9, rngs=rngs) if used else Identity()
