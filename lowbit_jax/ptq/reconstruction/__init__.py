"""Reconstruction: learned rounding, clipping and scales, by layer, by block or end to end."""

from lowbit_jax.ptq.reconstruction.block import Reconstruction
from lowbit_jax.ptq.reconstruction.end_to_end import EndToEnd
from lowbit_jax.ptq.reconstruction.equivalence import Equivalence
from lowbit_jax.ptq.reconstruction.layer import LayerReconstruction
from lowbit_jax.ptq.reconstruction.methods import (
    BRECQ,
    AdaRound,
    AutoRound,
    EfficientQAT,
    OmniQuant,
    QDrop,
)
from lowbit_jax.ptq.reconstruction.modules import ModuleVariable, Norms
from lowbit_jax.ptq.reconstruction.optimizer import Optimizer
from lowbit_jax.ptq.reconstruction.rounding import RoundingOffset, SoftRounding, Weights
from lowbit_jax.ptq.reconstruction.scales import LearnedClipping, RangeShare, Scales, ZeroPoints
from lowbit_jax.ptq.reconstruction.variables import Start, Variable
from lowbit_jax.ptq.reconstruction.written import Written

__all__ = [
    "BRECQ",
    "AdaRound",
    "AutoRound",
    "EfficientQAT",
    "EndToEnd",
    "Equivalence",
    "LayerReconstruction",
    "LearnedClipping",
    "ModuleVariable",
    "Norms",
    "OmniQuant",
    "Optimizer",
    "QDrop",
    "RangeShare",
    "Reconstruction",
    "RoundingOffset",
    "Scales",
    "SoftRounding",
    "Start",
    "Variable",
    "Weights",
    "Written",
    "ZeroPoints",
]
