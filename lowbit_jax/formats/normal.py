"""The codebook of least squared error for normally distributed values."""

import math

import numpy as np

from lowbit_jax.formats.types import Codebook, codebook


def normal_codebook(levels: int) -> Codebook:
    """The non-uniform quantizer of a standard normal variable of least squared error.

    J. Max, "Quantizing for minimum distortion", IRE Trans. Inf. Theory 6 (1960), and S. P. Lloyd:
    every value is the mean of the normal density between the midpoints to its neighbours. Iterated
    in float64 until nothing moves by 1e-12; scale 1 fits values of variance 1.

    Args:
        levels: How many values, 2 to 256.

    Raises:
        ValueError: Levels outside 2 to 256.
    """
    if not 2 <= levels <= 256:
        raise ValueError(f"normal_codebook: levels={levels} is not in 2 to 256.")
    # Panter and Dite's density of values, that of a normal variable of three times the variance,
    # is where the iteration starts.
    values = math.sqrt(3) * _normal_quantiles((np.arange(levels) + 0.5) / levels)
    for _ in range(20 * levels * levels + 100):
        edges = np.concatenate([[-40.0], (values[1:] + values[:-1]) / 2, [40.0]])
        mass, moment = np.diff(_cdf(edges)), -np.diff(_pdf(edges))
        moved = moment / mass
        moved = (moved - moved[::-1]) / 2  # symmetric, as the density is
        change = np.abs(moved - values).max()
        values = moved
        if change < 1e-12:
            break
    return codebook(values.tolist(), name=f"normal{levels}")


def _pdf(x: np.ndarray) -> np.ndarray:
    return np.exp(-x * x / 2) / math.sqrt(2 * math.pi)


def _cdf(x: np.ndarray) -> np.ndarray:
    return np.array([0.5 * math.erfc(-v / math.sqrt(2)) for v in x])


def _normal_quantiles(p: np.ndarray) -> np.ndarray:
    """By bisection: 60 halvings of [-10, 10] reach float64's resolution."""
    low, high = np.full_like(p, -10.0), np.full_like(p, 10.0)
    for _ in range(60):
        middle = (low + high) / 2
        below = _cdf(middle) < p
        low, high = np.where(below, middle, low), np.where(below, high, middle)
    return (low + high) / 2
