"""NVFP4 and MXFP4 against a transcription of their definitions, one scalar at a time."""

import math

import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

import lowbit_jax.formats as formats
from lowbit_jax.qtensor import quantize
from lowbit_jax.scale_formats import E4M3, E8M0
from lowbit_jax.spec import PerGroup, PerToken, QuantSpec

pytestmark = pytest.mark.usefixtures("strict_dtypes")

GRID = np.float32([0, 0.5, 1, 1.5, 2, 3, 4, 6])


def nearest_e2m1(v: float) -> tuple[float, float]:
    """The value, and how far `v` is from a tie, in units of v."""
    distance = np.abs(GRID - min(abs(v), 6.0))
    first, second = np.sort(distance)[:2]
    margin = (second - first) / max(abs(v), 1e-30) if abs(v) < 6 else 1.0
    return float(np.copysign(GRID[np.argmin(distance)], v)), margin


def mxfp4_column(x: np.ndarray) -> tuple[list[float], list[float]]:
    """OCP MX v1.0, section 6.3: shared exponent floor(log2 max) - emax, with emax = 2 for E2M1."""
    scales, values = [], []
    for start in range(0, len(x), 32):
        block = [float(v) for v in x[start : start + 32]]
        scale = 2.0 ** (math.floor(math.log2(max(map(abs, block)))) - 2)
        scales.append(scale)
        values += [nearest_e2m1(v / scale)[0] * scale for v in block]
    return scales, values


def test_mxfp4_is_the_ocp_definition():
    x = np.random.default_rng(0).normal(size=(64, 4)).astype(np.float32) * 0.02
    q = quantize(
        jnp.asarray(x),
        QuantSpec(format=formats.FP4_E2M1, granularity=PerGroup(32), scale_format=E8M0),
    )
    columns = [mxfp4_column(x[:, n]) for n in range(4)]
    assert q.scale.dtype == ml_dtypes.float8_e8m0fnu
    np.testing.assert_array_equal(
        np.asarray(q.scale).astype(np.float32), np.float32([c[0] for c in columns]).T
    )
    # Scales are powers of two, so every product is exact.
    np.testing.assert_array_equal(q.dequantize(), np.float32([c[1] for c in columns]).T)


def test_mxfp4_of_numbers_worked_out_by_hand():
    x = np.zeros((32, 1), np.float32)
    x[:6, 0] = [5.0, 7.0, -1.25, 0.26, 0.2, -7.9]  # max 7.9: exponent 2, scale 2**(2 - 2) = 1
    q = quantize(
        jnp.asarray(x),
        QuantSpec(format=formats.FP4_E2M1, granularity=PerGroup(32), scale_format=E8M0),
    )
    assert np.asarray(q.scale).astype(np.float32).tolist() == [[1.0]]
    assert np.asarray(q.dequantize())[:6, 0].tolist() == [4.0, 6.0, -1.0, 0.5, 0.0, -6.0]
    # 32 nibbles from the lowest: 4.0 = 6, 6.0 = 7, -1.0 = a, 0.5 = 1, 0 = 0, -6.0 = f.
    assert hex(int(q.words[0][0, 0])) == "0xf01a76"


def nvfp4(x: np.ndarray) -> tuple[np.ndarray, np.ndarray, float, np.ndarray]:
    """Two levels: global = max / (448 * 6); scale = e4m3(block max / 6 / global)."""
    whole = np.float32(np.abs(x).max() * np.float32(1 / (448 * 6)))
    scales = np.zeros((x.shape[0] // 16, x.shape[1]), np.float32)
    values, margins = np.zeros_like(x), np.ones_like(x)
    for n in range(x.shape[1]):
        for b in range(scales.shape[0]):
            block = x[16 * b : 16 * b + 16, n]
            relative = np.float32(np.abs(block).max() / 6 / whole)
            scales[b, n] = relative.astype(ml_dtypes.float8_e4m3fn)
            step = np.float32(scales[b, n] * whole)
            for i, v in enumerate(block):
                level, margin = nearest_e2m1(float(v) / float(step)) if step else (0.0, 1.0)
                values[16 * b + i, n] = np.float32(level) * step
                margins[16 * b + i, n] = margin
    return scales, values, whole, margins


@pytest.mark.parametrize("std", [1.0, 0.02, 1e-3, 1e-6])
def test_nvfp4_is_its_definition_at_every_magnitude(std):
    x = np.random.default_rng(1).normal(size=(64, 8)).astype(np.float32) * np.float32(std)
    x[:16, 0] = 0  # a block of zeros: scale 0
    x[16:32, 1] *= 1e-7  # a block whose scale underflows e4m3
    q = quantize(
        jnp.asarray(x),
        QuantSpec(format=formats.FP4_E2M1, granularity=PerGroup(16), scale_format=E4M3),
    )
    scales, values, whole, margins = nvfp4(x)
    np.testing.assert_array_equal(np.asarray(q.scale).astype(np.float32), scales)
    np.testing.assert_array_equal(q.global_scale, np.float32([[whole]]))
    # A quotient may differ in its last bits between division and reciprocal: not counted are values
    # that lie within 4 eps of a tie.
    clear = margins > 4 * np.finfo(np.float32).eps
    assert clear.mean() > 0.99
    np.testing.assert_array_equal(np.asarray(q.dequantize())[clear], values[clear])
    assert not np.asarray(q.codes())[:16, 0].any()
    assert not np.asarray(q.dequantize())[16:32, 1].any()


def test_relative_error_of_nvfp4_does_not_depend_on_the_magnitude():
    # One level of e4m3 scales alone would lose every weight at std 0.001.
    spec = QuantSpec(format=formats.FP4_E2M1, granularity=PerGroup(16), scale_format=E4M3)
    x = np.random.default_rng(2).normal(size=(256, 32)).astype(np.float32)
    errors = []
    for std in (0.2, 0.02, 0.005, 0.001):
        w = x * np.float32(std)
        error = np.asarray(quantize(jnp.asarray(w), spec).dequantize()) - w
        errors.append(np.linalg.norm(error) / np.linalg.norm(w))
    # Rounding x * std to float32 moves the codes of a few weights that lie at a tie, where both
    # neighbours are equally far: 1e-3 is a hundred times what that can add.
    np.testing.assert_allclose(errors, errors[0], rtol=1e-3)
    assert 0.09 < errors[0] < 0.1


def test_tokens_are_quantized_like_columns():
    x = np.random.default_rng(3).normal(size=(4, 64)).astype(np.float32)
    by_token = QuantSpec(format=formats.FP4_E2M1, granularity=PerToken(32), scale_format=E8M0)
    by_column = QuantSpec(format=formats.FP4_E2M1, granularity=PerGroup(32), scale_format=E8M0)
    tokens, columns = quantize(jnp.asarray(x), by_token), quantize(jnp.asarray(x.T), by_column)
    np.testing.assert_array_equal(tokens.dequantize(), columns.dequantize().T)
    np.testing.assert_array_equal(tokens.codes(), columns.codes().T)
