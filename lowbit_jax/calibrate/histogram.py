"""Clipping thresholds of static activations from a histogram of their magnitudes.

The histogram is small and on the host: this is NumPy in float64.
"""

import numpy as np


def kl_threshold(counts: np.ndarray, bin_width: float, *, levels: int = 128) -> float:
    """The magnitude at which to clip, of least KL divergence between the two distributions.

    For every candidate of i bins, i from `levels` up: the reference is the first i bins with the
    clipped mass added to the last; the approximation merges them into `levels` groups and spreads
    each group's mass evenly over those of its bins that are not empty. (S. Migacz, "8-bit inference
    with TensorRT", GTC 2017, where there are 2048 bins and 128 levels.)

    Args:
        counts: How many magnitudes fell into `[j, j + 1) * bin_width`.
        bin_width: Width of a bin, in the unit of the activations.
        levels: Magnitudes that the format can tell apart: 128 for int8.

    Returns: The threshold, a whole number of bins, in the unit of the activations.

    Raises:
        ValueError: Counts that are negative, all zero or fewer than the levels.
    """
    counts = np.asarray(counts, np.float64)
    if counts.ndim != 1 or counts.size < levels:
        raise ValueError(
            f"kl_threshold: a histogram of shape {counts.shape} cannot be merged into {levels} "
            "groups. Collect more bins; 2048 are usual."
        )
    if (counts < 0).any() or not counts.sum() > 0:
        raise ValueError(
            "kl_threshold: the counts are negative, NaN or all zero: no data was seen."
        )
    candidates = range(levels, counts.size + 1)
    return (int(np.argmin([_divergence(counts, i, levels) for i in candidates])) + levels) * (
        bin_width
    )


def _divergence(counts: np.ndarray, size: int, levels: int) -> float:
    """KL(reference || approximation) of clipping after `size` bins, in nats."""
    inside = counts[:size]
    reference = inside.copy()
    reference[-1] += counts[size:].sum()
    # Bin j belongs to group floor(j * levels / size): groups differ by at most one bin.
    group = np.arange(size) * levels // size
    filled = np.bincount(group, weights=inside > 0, minlength=levels)
    mass = np.bincount(group, weights=inside, minlength=levels)
    spread = (mass / np.maximum(filled, 1))[group] * (inside > 0)
    p, q = reference / reference.sum(), spread / max(spread.sum(), 1e-300)
    if (q[p > 0] == 0).any():
        return np.inf
    return float(np.sum(p[p > 0] * np.log(p[p > 0] / q[p > 0])))
