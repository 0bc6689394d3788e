"""What the kernels compute, in float64 NumPy."""

import numpy as np

from kernels_cpu.api import _WIDTHS, Codes


def unpack(words: tuple[np.ndarray, ...], bits: int, k: int) -> np.ndarray:
    """Codes [K, N] of planes [rows, N]."""
    codes, shift = np.zeros((), np.int64), 0
    for plane, width in zip(words, _WIDTHS[bits], strict=True):
        fields = np.asarray(plane).view(np.uint32)[:, None, :]
        shifts = np.arange(0, 32, width, dtype=np.uint32)[None, :, None]
        part = (fields >> shifts) & np.uint32(2**width - 1)
        codes = codes + (part.reshape(-1, plane.shape[1]).astype(np.int64) << shift)
        shift += width
    return codes[:k]


def round_rows(x: np.ndarray) -> np.ndarray:
    """Rows rounded to int8: what `act="int8"` multiplies, in float64."""
    x = np.asarray(x, np.float32)
    with np.errstate(invalid="ignore", over="ignore"):
        largest = np.max(np.abs(x), axis=1, keepdims=True, initial=0)
        scale = np.maximum(largest * np.float32(1 / 127), np.finfo(np.float32).tiny)
        rounded = np.rint(x * (np.float32(1) / scale)).astype(np.float64) * scale.astype(np.float64)
    return np.where(np.isfinite(largest), rounded, np.nan)


def dequantize(
    words: tuple[np.ndarray, ...],
    scale: np.ndarray,
    zero_point: np.ndarray | None,
    codes: Codes,
    k: int,
) -> np.ndarray:
    """W [K, N] in float64."""
    code = unpack(words, codes.bits, k)
    if codes.table is not None:
        level = np.asarray(codes.table, np.float32).astype(np.float64)[code]
    else:
        level = code * np.float64(codes.step) + np.float64(codes.low)
    repeats = codes.group or k
    if zero_point is not None:
        level = level - np.repeat(np.asarray(zero_point, np.float64), repeats, axis=0)
    return level * np.repeat(np.asarray(scale, np.float64), repeats, axis=0)
