"""Quantized twins of Flax NNX layers."""

from lowbit_jax.nn.activations import RPReLU
from lowbit_jax.nn.base import PackedTwin, TrainTwin, Twin
from lowbit_jax.nn.layers import (
    PACKED_TWINS,
    TRAIN_TWINS,
    PackedConv,
    PackedEinsum,
    PackedEmbed,
    PackedLinear,
    PackedLinearGeneral,
    QConv,
    QEinsum,
    QEmbed,
    QLinear,
    QLinearGeneral,
    to_float,
)
from lowbit_jax.nn.variables import Packed, QuantStat

__all__ = [
    "PACKED_TWINS",
    "TRAIN_TWINS",
    "Packed",
    "PackedConv",
    "PackedEinsum",
    "PackedEmbed",
    "PackedLinear",
    "PackedLinearGeneral",
    "PackedTwin",
    "QConv",
    "QEinsum",
    "QEmbed",
    "QLinear",
    "QLinearGeneral",
    "QuantStat",
    "RPReLU",
    "TrainTwin",
    "Twin",
    "to_float",
]
