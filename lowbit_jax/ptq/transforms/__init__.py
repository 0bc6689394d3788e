"""Transforms: rewrites of a float model that keep its function and make it easier to quantize.

All are folded into the weights that are there, so that inference pays nothing; only `Rotate` may
leave explicit rotations in front of some layers.

| transform | what it changes | paper |
|---|---|---|
| SmoothQuant | scales of what a norm feeds | arXiv:2211.10438 |
| AWQScale, AWQClip (a solver) | scales searched on the output; clipping | arXiv:2306.00978 |
| OutlierSuppression | shifts and scales searched on the output | arXiv:2304.09145 |
| Rotate | residual stream, values, heads and hidden features | arXiv:2404.00456 |
| CrossLayerEqualization | scales between layers, without data | arXiv:1906.04721 |
| FoldBatchNorm | batch norm into the layer before it | arXiv:1712.05877 |
"""

from lowbit_jax.ptq.transforms.awq import AWQClip, AWQScale
from lowbit_jax.ptq.transforms.batch_norm import FoldBatchNorm, check_no_batch_norm
from lowbit_jax.ptq.transforms.equalization import CrossLayerEqualization
from lowbit_jax.ptq.transforms.outlier_suppression import OutlierSuppression
from lowbit_jax.ptq.transforms.rotate import Rotate
from lowbit_jax.ptq.transforms.smoothquant import SmoothQuant

__all__ = [
    "AWQClip",
    "AWQScale",
    "CrossLayerEqualization",
    "FoldBatchNorm",
    "OutlierSuppression",
    "Rotate",
    "SmoothQuant",
    "check_no_batch_norm",
]
