"""LeNet-5 as the low-bit papers train it on MNIST (section 3.1 of arXiv:1605.04711).

    for each stage: x = activation(norm(pool(conv(x))))
    scores = head(activation(hidden_norm(hidden(x as one row))))

Windows are of 5 x 5 pixels, without padding, and maxima of 2 x 2. The order is that of section 3.2
of arXiv:1603.05279: maxima are taken of what the convolution gives, and the norm stands in front of
the activation. Were the maxima taken behind the signs, almost all of them would be +1. For ReLU the
order of norm and maxima changes the norm's statistics only, and costs a quarter.
"""

import dataclasses
import itertools
from collections.abc import Callable
from typing import Final

from flax import nnx
from jax import lax
from jaxtyping import Array, Float

from lowbit_jax.models.activation import ACTIVATIONS, require_activation
from lowbit_jax.models.config import require_sizes
from lowbit_jax.models.patches import convolve_by_patches
from lowbit_jax.models.registry import register

_CONVOLUTIONS: Final[dict[str, Callable[..., Array]]] = {
    "xla": lax.conv_general_dilated,
    "patches": convolve_by_patches,
}


@dataclasses.dataclass(frozen=True)
class LeNetConfig:
    """Sizes of a `LeNet`; the defaults are those of arXiv:1605.04711.

    Attributes:
        size: Height and width of the image, in pixels.
        in_channels: Channels of the image.
        channels: Channels of each stage, first to last.
        hidden: Width of the hidden layer behind the stages.
        out_features: Width of the output.
        kernel_size: Height and width of the convolutions' windows, in pixels.
        activation: "relu", or "hard_tanh" where the layers take the signs of their inputs.
        convolution: How convolutions are computed: "xla", or "patches" as matrix products.
    Raises: ValueError: a size is not an integer of at least 1, stages that leave no pixel, or an
        unknown activation or convolution.
    """

    size: int = 28
    in_channels: int = 1
    channels: tuple[int, ...] = (32, 64)
    hidden: int = 512
    out_features: int = 10
    kernel_size: int = 5
    activation: str = "relu"
    convolution: str = "patches"

    def __post_init__(self):
        where, sizes = "LeNetConfig", dataclasses.asdict(self)
        require_activation(where, sizes.pop("activation"))
        if (convolution := sizes.pop("convolution")) not in _CONVOLUTIONS:
            raise ValueError(
                f"{where}: convolution {convolution!r} is not known. Known: "
                f"{sorted(_CONVOLUTIONS)}."
            )
        require_sizes(where, **sizes)
        if not self.channels:
            raise ValueError(f"{where}: channels=() leaves no stage; name at least one width.")
        if self.last_size < 1:
            raise ValueError(
                f"{where}: images of size={self.size} have no pixel left behind "
                f"{len(self.channels)} stages with windows of kernel_size={self.kernel_size}."
            )

    @property
    def last_size(self) -> int:
        """Height and width behind the last stage, in pixels; below 1 if there is nothing left."""
        size = self.size
        for _ in self.channels:
            size = (size - self.kernel_size + 1) // 2
        return size


class LeNetStage(nnx.Module):
    """Convolution, maxima of 2 x 2 pixels, batch normalization, activation."""

    def __init__(self, config: LeNetConfig, in_channels: int, channels: int, *, rngs: nnx.Rngs):
        self.activation = config.activation
        # The norm subtracts the mean, so a bias of the convolution would have no effect.
        self.conv = nnx.Conv(
            in_channels,
            channels,
            (config.kernel_size, config.kernel_size),
            padding="VALID",
            use_bias=False,
            conv_general_dilated=_CONVOLUTIONS[config.convolution],
            rngs=rngs,
        )
        self.norm = nnx.BatchNorm(channels, momentum=0.9, rngs=rngs)

    def __call__(
        self, x: Float[Array, "batch height width _"]
    ) -> Float[Array, "batch _ _ channels"]:
        """Applies the stage; in training, the norm's running statistics move."""
        return ACTIVATIONS[self.activation](self.norm(_max_pool(self.conv(x))))


@register("lenet")
class LeNet(nnx.Module):
    """Stages of convolutions, a hidden layer, a head; `train()` and `eval()` as of every norm."""

    def __init__(self, config: LeNetConfig, *, rngs: nnx.Rngs):
        self.config = config
        widths = (config.in_channels, *config.channels)
        self.layers = nnx.List(
            LeNetStage(config, n, m, rngs=rngs) for n, m in itertools.pairwise(widths)
        )
        flat = config.last_size**2 * widths[-1]
        self.hidden = nnx.Linear(flat, config.hidden, use_bias=False, rngs=rngs)
        self.hidden_norm = nnx.BatchNorm(config.hidden, momentum=0.9, rngs=rngs)
        self.head = nnx.Linear(config.hidden, config.out_features, rngs=rngs)

    def __call__(
        self, x: Float[Array, "batch size size in_channels"]
    ) -> Float[Array, "batch out_features"]:
        """Scores of the classes for each image."""
        for layer in self.layers:
            x = layer(x)
        x = self.hidden_norm(self.hidden(x.reshape(x.shape[0], -1)))
        return self.head(ACTIVATIONS[self.config.activation](x))


def _max_pool(x: Float[Array, "batch height width n"]) -> Float[Array, "batch _ _ n"]:
    """Maxima of 2 x 2 pixels; an odd last row or column is left out.

    Without `lax.reduce_window`, whose gradient XLA scatters on the CPU; equal maxima share theirs.
    """
    batch, height, width, channels = x.shape
    rows, columns = height // 2, width // 2
    x = x[:, : 2 * rows, : 2 * columns]
    return x.reshape(batch, rows, 2, columns, 2, channels).max(axis=(2, 4))
