"""A small convolutional classifier with batch normalization."""

import dataclasses
import itertools

import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from lowbit_jax.models.config import require_sizes
from lowbit_jax.models.registry import register


@dataclasses.dataclass(frozen=True)
class CNNConfig:
    """Sizes of a `CNN`.

    Attributes:
        in_channels: Channels of the image.
        channels: Channels of each stage, first to last; every stage halves height and width.
        out_features: Width of the output.
        kernel_size: Height and width of the convolutions' windows, in pixels.
    Raises: ValueError: a size is not an integer of at least 1.
    """

    in_channels: int
    channels: tuple[int, ...]
    out_features: int
    kernel_size: int = 3

    def __post_init__(self):
        require_sizes("CNNConfig", **dataclasses.asdict(self))
        if not self.channels:
            raise ValueError("CNNConfig: channels=() leaves no stage; name at least one width.")


class Stage(nnx.Module):
    """Convolution of stride 2, batch normalization, relu."""

    def __init__(self, in_channels: int, channels: int, kernel_size: int, *, rngs: nnx.Rngs):
        window = (kernel_size, kernel_size)
        # The norm subtracts the mean, so a bias of the convolution would have no effect.
        self.conv = nnx.Conv(in_channels, channels, window, strides=2, use_bias=False, rngs=rngs)
        self.norm = nnx.BatchNorm(channels, rngs=rngs)

    def __call__(
        self, x: Float[Array, "batch height width _"]
    ) -> Float[Array, "batch _ _ channels"]:
        """Applies the stage; in training, the norm's running statistics move."""
        return nnx.relu(self.norm(self.conv(x)))


@register("cnn")
class CNN(nnx.Module):
    """`head(mean(stages(image)))`; `train()` and `eval()` choose the statistics of the norms."""

    def __init__(self, config: CNNConfig, *, rngs: nnx.Rngs):
        self.config = config
        widths = (config.in_channels, *config.channels)
        self.layers = nnx.List(
            Stage(n, m, config.kernel_size, rngs=rngs) for n, m in itertools.pairwise(widths)
        )
        self.head = nnx.Linear(widths[-1], config.out_features, rngs=rngs)

    def __call__(
        self, x: Float[Array, "batch height width in_channels"]
    ) -> Float[Array, "batch out_features"]:
        """Scores of the classes for each image."""
        for layer in self.layers:
            x = layer(x)
        return self.head(jnp.mean(x, axis=(1, 2)))
