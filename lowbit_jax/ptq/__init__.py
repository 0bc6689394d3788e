"""Post-training quantization: trained models quantized block by block, without retraining.

    model, report = lb.ptq.run(model, "w4a16_asym", batches, pipeline=[GPTQ(order="activation")])

A pipeline is transforms (which rewrite the float model without changing its function), then a
solver (which chooses the codes), then refinements. `driver` says how it is run, `stage` what a
stage of one's own has to do.
"""

from lowbit_jax.models.wiring import Link, Wiring
from lowbit_jax.ptq.driver import run
from lowbit_jax.ptq.gptq import GPTQ
from lowbit_jax.ptq.hqq import HQQ
from lowbit_jax.ptq.reconstruction import (
    BRECQ,
    AdaRound,
    AutoRound,
    EfficientQAT,
    EndToEnd,
    Equivalence,
    LayerReconstruction,
    LearnedClipping,
    Norms,
    OmniQuant,
    Optimizer,
    QDrop,
    RangeShare,
    Reconstruction,
    RoundingOffset,
    Scales,
    SoftRounding,
    Variable,
    Weights,
    Written,
    ZeroPoints,
)
from lowbit_jax.ptq.report import Report
from lowbit_jax.ptq.rtn import RoundToNearest
from lowbit_jax.ptq.sensitivity import sensitivity
from lowbit_jax.ptq.stage import LayerProblem, LayerSolution, Stage
from lowbit_jax.ptq.transforms import (
    AWQClip,
    AWQScale,
    CrossLayerEqualization,
    FoldBatchNorm,
    OutlierSuppression,
    Rotate,
    SmoothQuant,
)
from lowbit_jax.ptq.unfinished import Stopped

__all__ = [
    "BRECQ",
    "GPTQ",
    "HQQ",
    "AWQClip",
    "AWQScale",
    "AdaRound",
    "AutoRound",
    "CrossLayerEqualization",
    "EfficientQAT",
    "EndToEnd",
    "Equivalence",
    "FoldBatchNorm",
    "LayerProblem",
    "LayerReconstruction",
    "LayerSolution",
    "LearnedClipping",
    "Link",
    "Norms",
    "OmniQuant",
    "Optimizer",
    "OutlierSuppression",
    "QDrop",
    "RangeShare",
    "Reconstruction",
    "Report",
    "Rotate",
    "RoundToNearest",
    "RoundingOffset",
    "Scales",
    "SmoothQuant",
    "SoftRounding",
    "Stage",
    "Stopped",
    "Variable",
    "Weights",
    "Wiring",
    "Written",
    "ZeroPoints",
    "run",
    "sensitivity",
]
