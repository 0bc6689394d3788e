"""NVFP4 and MXFP4 of compressed-tensors against a reader of the page."""

import ml_dtypes
import numpy as np
import pytest

from lowbit_jax import formats
from lowbit_jax.interop.codecs import block_floats
from lowbit_jax.scale_formats import E4M3, E8M0
from lowbit_jax.spec import PerGroup, QuantSpec

E2M1 = np.float32([0, 0.5, 1, 1.5, 2, 3, 4, 6])
E2M1 = np.concatenate([E2M1, -E2M1])
SPECS = {
    block_floats.NVFP4: QuantSpec(
        format=formats.FP4_E2M1, granularity=PerGroup(16), scale_format=E4M3
    ),
    block_floats.MXFP4: QuantSpec(
        format=formats.FP4_E2M1, granularity=PerGroup(32), scale_format=E8M0
    ),
}


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("format", SPECS)
@pytest.mark.parametrize("shape", [(64, 5), (32, 1), (96, 8)])
def test_round_trip(kernels, format, shape, seed):
    kernel = kernels.random(SPECS[format], shape, seed)
    tensors = block_floats.encode(kernel, format=format, where="w")
    back = block_floats.decode(tensors, format=format, where="w")
    kernels.assert_same(back, kernel)
    kernels.assert_same_bytes(block_floats.encode(back, format=format, where="w"), tensors)


@pytest.mark.parametrize("format", SPECS)
def test_a_plain_reader_sees_the_same_weights(kernels, format):
    kernel = kernels.random(SPECS[format], (64, 6), 0)
    tensors = block_floats.encode(kernel, format=format, where="w")
    n, half = tensors["weight_packed"].shape
    size = 16 if format == block_floats.NVFP4 else 32
    w = np.empty((n, half * 2), np.float32)
    for i in range(n):
        for j in range(half * 2):
            byte = int(tensors["weight_packed"][i, j // 2])
            code = byte & 15 if j % 2 == 0 else byte >> 4  # low nibble = even index
            scale = tensors["weight_scale"][i, j // size]
            if format == block_floats.MXFP4:
                w[i, j] = E2M1[code] * np.float32(2.0 ** (int(scale) - 127))
            else:
                w[i, j] = E2M1[code] * np.float32(scale) / tensors["weight_global_scale"][0]
    # NVFP4: the page divides at the end; ours multiplies by a reciprocal that was rounded, and
    # rounds its product with the scale: three roundings against one of 2**-24 each.
    rtol = 0 if format == block_floats.MXFP4 else 4 * 2.0**-24
    np.testing.assert_allclose(kernel.dequantize().T, w, rtol=rtol, atol=0)


def test_a_power_of_two_divides_exactly(kernels):
    tensors = {
        "weight_packed": np.arange(8, dtype=np.uint8).reshape(1, 8) * 17,
        "weight_scale": np.full((1, 1), 448, ml_dtypes.float8_e4m3fn),
        "weight_global_scale": np.float32([4096]),
    }
    kernel = block_floats.decode(tensors, format=block_floats.NVFP4, where="w")
    wanted = np.repeat(E2M1[:8], 2) * np.float32(448 / 4096)
    np.testing.assert_array_equal(kernel.dequantize()[:, 0], wanted)


def test_the_divisor_of_a_file_is_kept(kernels):
    """Where 1 / (1 / x) is not x, of which there are many, the file's number goes out again."""
    many = np.random.default_rng(0).uniform(1000, 4000, 1000).astype(np.float32)
    found = many[np.float32(1) / (np.float32(1) / many) != many][:1]
    assert found.size
    tensors = block_floats.encode(
        kernels.random(SPECS[block_floats.NVFP4], (16, 2), 0), format=block_floats.NVFP4, where="w"
    ) | {"weight_global_scale": found}
    back = block_floats.decode(tensors, format=block_floats.NVFP4, where="w")
    again = block_floats.encode(back, format=block_floats.NVFP4, where="w")
    kernels.assert_same_bytes(again, tensors)


def test_what_it_cannot_hold_is_refused(kernels):
    kernel = kernels.random(SPECS[block_floats.MXFP4], (32, 2), 0)
    with pytest.raises(NotImplementedError, match=r"nvfp4-pack-quantized cannot.*: nvfp4a16"):
        block_floats.encode(kernel, format=block_floats.NVFP4, where="w")


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("weight_global_scale", np.float32([0]), "weight_global_scale is 0"),
        ("weight_global_scale", np.float32([np.nan]), "NaN or infinite"),
        ("weight_global_scale", np.float32([1, 2]), "not one number"),
        ("weight_scale", np.full((2, 1), 0x7F, np.uint8).view(ml_dtypes.float8_e4m3fn), "NaN"),
        ("weight_scale", np.zeros((2, 1), np.uint8), "weight_scale is uint8"),
        ("weight_packed", np.zeros((2, 9), np.uint8), "rows of 18 codes are no whole blocks"),
    ],
)
def test_damage_is_named(kernels, name, value, message):
    kernel = kernels.random(SPECS[block_floats.NVFP4], (16, 2), 0)
    tensors = block_floats.encode(kernel, format=block_floats.NVFP4, where="w")
    with pytest.raises(ValueError, match=message):
        block_floats.decode(tensors | {name: value}, format=block_floats.NVFP4, where="w")
