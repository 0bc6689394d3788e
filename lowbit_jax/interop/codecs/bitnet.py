"""Ternary kernels as transformers' BitLinear keeps them.

weight        uint8 [N / 4, K]    row r holds in its bits 2 i and 2 i + 1 the output r + i N / 4,
                                  as value + 1
weight_scale  [1]                 "bitlinear": W = value / weight_scale
                                  "autobitlinear": W = value * weight_scale
"""

from collections.abc import Mapping
from typing import Final, Literal

import numpy as np

from lowbit_jax import formats
from lowbit_jax.interop.codecs.parts import (
    DoesNotFit,
    Kernel,
    codes_of,
    make_qtensor,
    refuse,
    require,
    scale_format_of,
    scale_of,
    take,
)
from lowbit_jax.scale_formats import FLOAT32, ScaleFormat
from lowbit_jax.spec import PerTensor, QuantSpec

PARTS: Final = ("weight", "weight_scale")
Linear = Literal["bitlinear", "autobitlinear"]


def decode(tensors: Mapping[str, np.ndarray], *, linear: Linear, where: str) -> Kernel:
    """The kernel in a layer's `PARTS`; `linear` says what the scale means.

    Raises: ValueError: The tensors do not belong together, or a code stands for no value.
    """
    weight, scale = take(tensors, "weight", where, 2), take(tensors, "weight_scale", where, 0, 1)
    require(weight, "weight", where, dtype=np.uint8)
    if scale.size != 1 or not weight.size:
        raise ValueError(f"{where}: weight {weight.shape} and weight_scale {scale.shape}.")
    kept = scale.reshape(1, 1)
    if linear == "bitlinear":
        if not float(scale.astype(np.float32).reshape(())):
            raise ValueError(f"{where}: weight_scale is 0, and the weight is divided by it.")
        with np.errstate(over="ignore"):  # an infinite one is refused as such
            kept = np.float32(1) / kept.astype(np.float32)
    rows = len(weight)
    codes = np.empty((weight.shape[1], rows * 4), np.uint8)
    for i in range(4):
        codes[:, i * rows : (i + 1) * rows] = ((weight >> np.uint8(2 * i)) & 3).T
    spec = QuantSpec(
        format=formats.TERNARY,
        granularity=PerTensor(),
        scale_format=scale_format_of(kept, where),
    )
    return Kernel(make_qtensor(codes, spec, kept, where=where))


def encode(
    kernel: Kernel, *, linear: Linear, where: str, scale_format: ScaleFormat = FLOAT32
) -> dict[str, np.ndarray]:
    """A layer's tensors: the inverse of `decode`.

    Raises:
        NotImplementedError: The format has no such scheme.
        DoesNotFit: Outputs do not come in fours.
    """
    q = kernel.qtensor
    if q.spec.format is not formats.TERNARY or q.scale.size != 1:
        reason = "it keeps ternary values with one scale per tensor"
        refuse(q.spec, "Hugging Face's BitNet", reason, "w1_58a8")
    if kernel.input_permutation is not None:
        refuse(q.spec, "Hugging Face's BitNet", "inputs keep their order", "the same without it")
    if q.shape[1] % 4:
        raise DoesNotFit(f"{where}: {q.shape[1]} outputs do not come in fours, as BitNet's do.")
    scale = scale_of(q).astype(np.float32).reshape(1)
    stored = np.float32(1) / scale if linear == "bitlinear" else scale
    parts = np.split(codes_of(q).T, 4)
    weight = parts[0] | parts[1] << 2 | parts[2] << 4 | parts[3] << 6
    return {
        "weight": np.ascontiguousarray(weight),
        "weight_scale": stored.astype(scale_format.dtype),
    }
