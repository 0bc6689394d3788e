"""Plain Flax NNX models: they know nothing of quantization, and their layers can be swapped."""

from lowbit_jax.models.cache import AttendingCache, KVCache, LayerCache
from lowbit_jax.models.cnn import CNN, CNNConfig
from lowbit_jax.models.config import DecoderConfig
from lowbit_jax.models.decoder import Block, Decoder
from lowbit_jax.models.lenet import LeNet, LeNetConfig
from lowbit_jax.models.mlp import MLP, MLPConfig
from lowbit_jax.models.patches import convolve_by_patches
from lowbit_jax.models.registry import build, family_of, register
from lowbit_jax.models.resnet import BasicBlock, ResNet, ResNetConfig, cifar_input
from lowbit_jax.models.sharding import param_shardings, param_spec

__all__ = [
    "CNN",
    "MLP",
    "AttendingCache",
    "BasicBlock",
    "Block",
    "CNNConfig",
    "Decoder",
    "DecoderConfig",
    "KVCache",
    "LayerCache",
    "LeNet",
    "LeNetConfig",
    "MLPConfig",
    "ResNet",
    "ResNetConfig",
    "build",
    "cifar_input",
    "convolve_by_patches",
    "family_of",
    "param_shardings",
    "param_spec",
    "register",
]
