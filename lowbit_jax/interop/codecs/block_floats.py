"""e2m1 in blocks with e4m3 or e8m0 scales, as compressed-tensors packs it: NVFP4 and MXFP4.

    weight_packed        uint8 [N, K / 2]             the even code in the low bits
    weight_scale         NVFP4: e4m3 [N, K / 16]      MXFP4: e8m0 as uint8 [N, K / 32]
    weight_global_scale  NVFP4: float32 [1]           448 * 6 / absmax, which divides

Our `global_scale` multiplies. The divisor is kept beside it, for 1 / (1 / x) is not always x.
"""

from collections.abc import Mapping
from typing import Final

import ml_dtypes
import numpy as np

from lowbit_jax import formats
from lowbit_jax.interop.codecs.parts import (
    DoesNotFit,
    Kernel,
    check_finite,
    codes_of,
    make_qtensor,
    refuse,
    require,
    scale_of,
    take,
)
from lowbit_jax.scale_formats import E4M3, E8M0
from lowbit_jax.spec import PerGroup, QuantSpec

NVFP4, MXFP4 = "nvfp4-pack-quantized", "mxfp4-pack-quantized"
FORMATS: Final = (NVFP4, MXFP4)
PARTS: Final = ("weight_packed", "weight_scale", "weight_global_scale")
_E4M3: Final = np.dtype(ml_dtypes.float8_e4m3fn)
_E8M0: Final = np.dtype(ml_dtypes.float8_e8m0fnu)
_SPECS: Final = {
    NVFP4: QuantSpec(format=formats.FP4_E2M1, granularity=PerGroup(16), scale_format=E4M3),
    MXFP4: QuantSpec(format=formats.FP4_E2M1, granularity=PerGroup(32), scale_format=E8M0),
}
_PRESETS: Final = {NVFP4: "nvfp4a16", MXFP4: "mxfp4a16"}


def decode(tensors: Mapping[str, np.ndarray], *, format: str, where: str) -> Kernel:
    """The kernel in a layer's `PARTS`; `format` is one of `FORMATS`.

    Raises: ValueError: The tensors do not belong together.
    """
    spec = _SPECS[format]
    packed, scale = (
        take(tensors, "weight_packed", where, 2),
        take(tensors, "weight_scale", where, 2),
    )
    require(packed, "weight_packed", where, dtype=np.uint8)
    n, k = packed.shape[0], packed.shape[1] * 2
    size = spec.granularity.k
    assert size is not None
    if not n or not k or k % size:
        raise ValueError(f"{where}: rows of {k} codes are no whole blocks of {size}.")
    scale_dtype = _E4M3 if format == NVFP4 else np.uint8
    require(scale, "weight_scale", where, dtype=scale_dtype, shape=(n, k // size))
    codes = np.empty((n, k), np.uint8)
    codes[:, 0::2], codes[:, 1::2] = packed & 15, packed >> 4
    if format == MXFP4:
        return Kernel(make_qtensor(codes.T, spec, scale.view(_E8M0).T, where=where))
    divisor = take(tensors, "weight_global_scale", where, 0, 1)
    if divisor.size != 1:
        raise ValueError(f"{where}: weight_global_scale is {divisor.shape}, and not one number.")
    require(divisor, "weight_global_scale", where, dtype=np.float32)
    divisor = divisor.reshape(1, 1)
    check_finite(divisor, f"{where}: weight_global_scale")
    if not divisor.any():
        raise ValueError(f"{where}: weight_global_scale is 0, and the weight is divided by it.")
    with np.errstate(over="ignore"):  # an infinite one is refused as such
        multiplier = np.float32(1) / divisor
    q = make_qtensor(codes.T, spec, scale.T, global_scale=multiplier, where=where)
    return Kernel(q, global_divisor=divisor)


def encode(kernel: Kernel, *, format: str, where: str) -> dict[str, np.ndarray]:
    """A layer's tensors: the inverse of `decode`.

    Raises:
        NotImplementedError: The format has no such scheme.
        DoesNotFit: Codes do not fill bytes.
    """
    q = kernel.qtensor
    if q.spec != _SPECS[format]:
        reason = f"it keeps {_SPECS[format].describe()}"
        refuse(q.spec, format, reason, _PRESETS[format])
    if kernel.input_permutation is not None:
        refuse(q.spec, format, "it has no activation order", "the same without it")
    if q.k % 2:
        raise DoesNotFit(f"{where}: {q.k} codes do not fill bytes.")
    codes = codes_of(q).T
    tensors = {"weight_packed": codes[:, 0::2] | codes[:, 1::2] << 4}
    scale = np.ascontiguousarray(scale_of(q).T)
    if format == MXFP4:
        return tensors | {"weight_scale": scale.view(np.uint8)}
    return tensors | {"weight_scale": scale, "weight_global_scale": divisor_of(kernel).reshape(1)}


def divisor_of(kernel: Kernel) -> np.ndarray:
    """What the weight is divided by, float32 [1, 1]: that of the file it came from.

    A kernel of ours has a multiplier instead. Its divisor is the number next to the reciprocal
    whose own reciprocal is that multiplier; where there is none, the nearest.
    """
    if kernel.global_divisor is not None:
        return kernel.global_divisor
    multiplier = np.asarray(kernel.qtensor.global_scale, np.float32)
    nearest = np.float32(1) / multiplier
    for divisor in (nearest, np.nextafter(nearest, np.inf), np.nextafter(nearest, 0)):
        divisor = divisor.astype(np.float32)
        if np.array_equal(np.float32(1) / divisor, multiplier):
            return divisor
    return nearest
