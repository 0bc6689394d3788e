"""Quantizers: how an array is quantized while it trains, and frozen afterwards."""

from lowbit_jax.quantizers.base import Quantizer, State, from_dict
from lowbit_jax.quantizers.fixed import FixedRange, range_state
from lowbit_jax.quantizers.learned import LSQ
from lowbit_jax.quantizers.ranges import Absmax, AbsMean, MinMax, StaticAbsmax

ALL = (Absmax, MinMax, AbsMean, StaticAbsmax, LSQ, FixedRange)

__all__ = [
    "ALL",
    "LSQ",
    "AbsMean",
    "Absmax",
    "FixedRange",
    "MinMax",
    "Quantizer",
    "State",
    "StaticAbsmax",
    "from_dict",
    "range_state",
]
