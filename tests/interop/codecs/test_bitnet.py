"""transformers' BitNet tensors against a reader of the page."""

import ml_dtypes
import numpy as np
import pytest

from lowbit_jax import formats
from lowbit_jax.interop.codecs import bitnet
from lowbit_jax.interop.codecs.parts import DoesNotFit
from lowbit_jax.scale_formats import BFLOAT16, FLOAT32
from lowbit_jax.spec import PerChannel, PerTensor, QuantSpec

SPEC = QuantSpec(format=formats.TERNARY, granularity=PerTensor(), scale_format=FLOAT32)
SCALE = np.float32([0.0371])


def tensors_of(shape, scale, seed=0):
    codes = np.random.default_rng(seed).integers(0, 3, shape, dtype=np.uint8)
    n = len(codes)
    weight = np.zeros((n // 4, shape[1]), np.uint8)
    for row in range(n):
        i, r = divmod(row, n // 4)  # bits 2 i of row r hold output r + i n / 4
        weight[r] |= codes[row] << (2 * i)
    return {"weight": weight, "weight_scale": scale}, codes.astype(np.float32) - 1


@pytest.mark.parametrize("linear", ["bitlinear", "autobitlinear"])
@pytest.mark.parametrize("scale", [SCALE, SCALE.astype(ml_dtypes.bfloat16)])
@pytest.mark.parametrize("shape", [(8, 12), (4, 1), (132, 7)])
def test_read_as_the_page_says_and_written_again(kernels, linear, scale, shape):
    tensors, values = tensors_of(shape, scale)
    kernel = bitnet.decode(tensors, linear=linear, where="w")
    factor = np.float32(1) / np.float32(scale) if linear == "bitlinear" else np.float32(scale)
    # Ternary values: dividing and multiplying by the reciprocal are the same.
    np.testing.assert_array_equal(kernel.dequantize().T, values * factor)
    kept = FLOAT32 if scale.dtype == np.float32 else BFLOAT16
    again = bitnet.encode(kernel, linear=linear, where="w", scale_format=kept)
    if linear == "bitlinear" and kept is FLOAT32:
        # The reciprocal of a reciprocal: one unit in the last place.
        np.testing.assert_allclose(again["weight_scale"], scale, rtol=2.0**-23)
        again["weight_scale"] = scale
    kernels.assert_same_bytes(again, tensors)


def test_our_kernels_come_back(kernels):
    kernel = kernels.random(SPEC, (24, 8), 0)
    tensors = bitnet.encode(kernel, linear="autobitlinear", where="w")
    kernels.assert_same(bitnet.decode(tensors, linear="autobitlinear", where="w"), kernel)


def test_what_it_cannot_hold_is_refused(kernels):
    channel = QuantSpec(format=formats.TERNARY, granularity=PerChannel())
    with pytest.raises(NotImplementedError, match=r"cannot hold ternary per channel.*w1_58a8"):
        bitnet.encode(kernels.random(channel, (8, 8), 0), linear="autobitlinear", where="w")
    with pytest.raises(DoesNotFit, match="w: 6 outputs do not come in fours"):
        bitnet.encode(kernels.random(SPEC, (8, 6), 0), linear="autobitlinear", where="w")


def test_damage_is_named():
    tensors, _ = tensors_of((8, 12), SCALE)
    with pytest.raises(ValueError, match="96 of 96 codes stand for no value of ternary"):
        bitnet.decode(
            tensors | {"weight": np.full((2, 12), 255, np.uint8)}, linear="bitlinear", where="w"
        )
    with pytest.raises(ValueError, match="weight_scale is 0"):
        bitnet.decode(tensors | {"weight_scale": SCALE * 0}, linear="bitlinear", where="w")
