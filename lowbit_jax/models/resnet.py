"""The residual networks of CIFAR-10 (section 4.2 of arXiv:1512.03385).

    x = relu(norm(conv(image)))
    for each block: x = relu(shortcut(x) + norm2(conv2(relu(norm1(conv1(x))))))
    logits = head(mean of x over the image)

Every stage but the first halves height and width in its first block. Shortcuts have no parameters
(option A of the paper): where a stage begins, every second pixel is taken and the new channels are
zeros, half of them on either side, as in the implementations whose weights are loaded here.
"""

import dataclasses

import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float, Float32, UInt8

from lowbit_jax.models.config import require_sizes
from lowbit_jax.models.identity import Identity
from lowbit_jax.models.registry import register

# Of red, green and blue in [0, 1]; what the published weights were trained with (ImageNet's).
_MEAN = (0.485, 0.456, 0.406)
_STD = (0.229, 0.224, 0.225)


@dataclasses.dataclass(frozen=True)
class ResNetConfig:
    """Sizes of a `ResNet`; the defaults are ResNet-20.

    Attributes:
        blocks: Blocks of each stage, first to last.
        widths: Channels of each stage; none has fewer than the one before, and steps are even.
        in_channels: Channels of the image.
        out_features: Width of the output.
        folded: Batch norms were folded into the convolutions, which have biases instead.
    Raises: ValueError: a size is not an integer of at least 1, or widths do not fit.
    """

    blocks: tuple[int, ...] = (3, 3, 3)
    widths: tuple[int, ...] = (16, 32, 64)
    in_channels: int = 3
    out_features: int = 10
    folded: bool = False

    def __post_init__(self):
        sizes = dataclasses.asdict(self)
        sizes.pop("folded")
        require_sizes("ResNetConfig", **sizes)
        if not self.blocks or len(self.blocks) != len(self.widths):
            raise ValueError(
                f"ResNetConfig: blocks={self.blocks} and widths={self.widths} must name as many "
                f"stages, and at least one."
            )
        steps = np.diff(self.widths)
        if np.any(steps < 0) or np.any(steps % 2):
            raise ValueError(
                f"ResNetConfig: widths={self.widths} must grow by even steps: shortcuts put as "
                f"many zeros on either side of the channels."
            )


def _conv(inputs: int, outputs: int, stride: int, folded: bool, *, rngs: nnx.Rngs) -> nnx.Conv:
    # "SAME" would pad an even image at its end only where the stride is 2.
    return nnx.Conv(
        inputs,
        outputs,
        (3, 3),
        strides=stride,
        padding=((1, 1), (1, 1)),
        use_bias=folded,  # a norm behind it subtracts the mean
        rngs=rngs,
    )


def _norm(channels: int, folded: bool, *, rngs: nnx.Rngs) -> nnx.Module:
    if folded:
        return Identity()
    return nnx.BatchNorm(channels, momentum=0.9, epsilon=1e-5, rngs=rngs)


class BasicBlock(nnx.Module):
    """Two convolutions and the shortcut around them."""

    def __init__(
        self, inputs: int, outputs: int, stride: int, folded: bool = False, *, rngs: nnx.Rngs
    ):
        self.stride, self.new_channels = stride, outputs - inputs
        self.conv1 = _conv(inputs, outputs, stride, folded, rngs=rngs)
        self.norm1 = _norm(outputs, folded, rngs=rngs)
        self.conv2 = _conv(outputs, outputs, 1, folded, rngs=rngs)
        self.norm2 = _norm(outputs, folded, rngs=rngs)

    def __call__(
        self, x: Float[Array, "batch height width _"]
    ) -> Float[Array, "batch _ _ channels"]:
        """Applies the block; in training, the norms' running statistics move."""
        y = nnx.relu(self.norm1(self.conv1(x)))
        y = self.norm2(self.conv2(y))
        shortcut = x[:, :: self.stride, :: self.stride, :]
        side = self.new_channels // 2
        return nnx.relu(y + jnp.pad(shortcut, ((0, 0), (0, 0), (0, 0), (side, side))))


@register("resnet")
class ResNet(nnx.Module):
    """`head(mean(layers(relu(norm(conv(image))))))`; `train()` and `eval()` as of every norm."""

    def __init__(self, config: ResNetConfig, *, rngs: nnx.Rngs):
        self.config = config
        width = config.widths[0]
        self.conv = _conv(config.in_channels, width, 1, config.folded, rngs=rngs)
        self.norm = _norm(width, config.folded, rngs=rngs)
        layers = []
        for stage, (count, outputs) in enumerate(zip(config.blocks, config.widths, strict=True)):
            for i in range(count):
                stride = 2 if stage and not i else 1
                layers.append(BasicBlock(width, outputs, stride, config.folded, rngs=rngs))
                width = outputs
        self.layers = nnx.List(layers)
        self.head = nnx.Linear(width, config.out_features, rngs=rngs)

    def __call__(
        self, x: Float[Array, "batch height width in_channels"]
    ) -> Float[Array, "batch out_features"]:
        """Scores of the classes for each image; see `cifar_input`."""
        x = nnx.relu(self.norm(self.conv(x)))
        for layer in self.layers:
            x = layer(x)
        return self.head(jnp.mean(x, axis=(1, 2)))


def cifar_input(
    images: UInt8[np.ndarray, "batch height width 3"],
) -> Float32[np.ndarray, "batch height width 3"]:
    """RGB images as the published CIFAR models take them: scaled to [0, 1], then standardized."""
    mean, std = np.array(_MEAN, np.float32), np.array(_STD, np.float32)
    scaled = images.astype(np.float32) * np.float32(1 / 255)
    return (scaled - mean[None, None, None]) / std[None, None, None]
