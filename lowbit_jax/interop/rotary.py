"""Ways to stretch rotary positions that are a divisor for each frequency."""

import math


def linear_factors(factor: float, head_size: int) -> tuple[float, ...]:
    """All positions divided by `factor` (arXiv:2306.15595)."""
    return (float(factor),) * (head_size // 2)


def llama3_factors(
    head_size: int, theta: float, *, factor: float, low: float, high: float, original: int
) -> tuple[float, ...]:
    """Llama 3.1's: slow frequencies are divided by `factor`, fast ones left, a ramp in between.

    Args:
        head_size: Features of one head.
        theta: Base of the frequencies, at least 1.
        factor: How many times longer the context is.
        low: A frequency with less than so many turns in the `original` context is slow.
        high: One with more than so many is fast; `high > low`.
        original: The context that was trained first, in tokens.
    Raises: ValueError: A number is not as it is said here.
    """
    if not (factor > 0 and 0 < low < high and theta >= 1):
        raise ValueError(
            f"rope scaling llama3: factor={factor}, low_freq_factor={low}, "
            f"high_freq_factor={high}, theta={theta}; factor > 0, 0 < low < high and theta >= 1 "
            f"are needed."
        )
    half = head_size // 2
    factors = []
    for i in range(half):
        turns = original * theta ** (-i / half) / (2 * math.pi)
        share = min(1.0, max(0.0, (turns - low) / (high - low)))  # of the frequency as it was
        factors.append(1 / (share + (1 - share) / factor))
    return tuple(factors)
