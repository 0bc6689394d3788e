"""Quantizers: how an array is quantized while it trains, and frozen afterwards."""

from lowbit_jax.quantizers.base import Quantizer, State, from_dict
from lowbit_jax.quantizers.clipping import PACT, LSQPlus
from lowbit_jax.quantizers.dorefa import DoReFa
from lowbit_jax.quantizers.elastic import ElasticBinary, StretchedElastic
from lowbit_jax.quantizers.fixed import FixedRange, range_state
from lowbit_jax.quantizers.learned import LSQ
from lowbit_jax.quantizers.ranges import Absmax, AbsMean, MinMax, StaticAbsmax
from lowbit_jax.quantizers.signs import XNOR, OneBit, RSign, Sign
from lowbit_jax.quantizers.ternary import TWN

ALL = (
    Absmax, MinMax, AbsMean, StaticAbsmax, LSQ, FixedRange, Sign, XNOR, TWN, DoReFa, ElasticBinary,
    StretchedElastic, PACT, LSQPlus, RSign, OneBit,
)  # fmt: skip

__all__ = [
    "ALL",
    "LSQ",
    "PACT",
    "TWN",
    "XNOR",
    "AbsMean",
    "Absmax",
    "DoReFa",
    "ElasticBinary",
    "FixedRange",
    "LSQPlus",
    "MinMax",
    "OneBit",
    "Quantizer",
    "RSign",
    "Sign",
    "State",
    "StaticAbsmax",
    "StretchedElastic",
    "from_dict",
    "range_state",
]
