"""Quantizers: how an array is quantized while it trains, and frozen afterwards."""

from lowbit_jax.quantizers.base import Quantizer, State, from_dict
from lowbit_jax.quantizers.clipping import PACT, LSQPlus
from lowbit_jax.quantizers.dorefa import DoReFa
from lowbit_jax.quantizers.elastic import ElasticBinary, StretchedElastic
from lowbit_jax.quantizers.fixed import FixedRange, range_state, state_range
from lowbit_jax.quantizers.learned import LSQ
from lowbit_jax.quantizers.learned_values import TTQ, LQNets
from lowbit_jax.quantizers.nonuniform import N2UQ, EntropyPreserving
from lowbit_jax.quantizers.powers import INQ, APoT
from lowbit_jax.quantizers.progressive import Progressive
from lowbit_jax.quantizers.quest import QuEST
from lowbit_jax.quantizers.ranges import Absmax, AbsMean, MinMax, StaticAbsmax
from lowbit_jax.quantizers.signs import XNOR, CentredSign, OneBit, RSign, Sign
from lowbit_jax.quantizers.ternary import TWN

ALL = (
    Absmax, MinMax, AbsMean, StaticAbsmax, LSQ, FixedRange, Sign, XNOR, TWN, DoReFa, ElasticBinary,
    StretchedElastic, PACT, LSQPlus, RSign, OneBit, TTQ, LQNets, N2UQ,
    EntropyPreserving, CentredSign, INQ, APoT, QuEST, Progressive,
)  # fmt: skip

__all__ = [
    "ALL",
    "INQ",
    "LSQ",
    "N2UQ",
    "PACT",
    "TTQ",
    "TWN",
    "XNOR",
    "APoT",
    "AbsMean",
    "Absmax",
    "CentredSign",
    "DoReFa",
    "ElasticBinary",
    "EntropyPreserving",
    "FixedRange",
    "LQNets",
    "LSQPlus",
    "MinMax",
    "OneBit",
    "Progressive",
    "QuEST",
    "Quantizer",
    "RSign",
    "Sign",
    "State",
    "StaticAbsmax",
    "StretchedElastic",
    "from_dict",
    "range_state",
    "state_range",
]
