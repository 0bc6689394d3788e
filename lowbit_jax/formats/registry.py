"""Every format by name."""

import difflib
from typing import Any, Final

import numpy as np

from lowbit_jax.formats.learned import Learned, signed_sums
from lowbit_jax.formats.types import Codebook, Format, IntGrid, Minifloat


def _signed(bits: int, narrow: bool = False) -> IntGrid:
    half = 2 ** (bits - 1)
    name = f"int{bits}_narrow" if narrow else f"int{bits}"
    return IntGrid(name, bits, qmin=1 - half if narrow else -half, qmax=half - 1, low=-half)


def _unsigned(bits: int) -> IntGrid:
    return IntGrid(f"uint{bits}", bits, qmin=0, qmax=2**bits - 1, low=0, signed=False)


def _half(bits: int) -> IntGrid:
    end = 2 ** (bits - 1) - 0.5
    return IntGrid(f"int{bits}_half", bits, qmin=-end, qmax=end, low=-end)


def _powers_of_two(bits: int) -> Codebook:
    """0 and +-2**-i, as many as fit: logarithmic, as in arXiv:1702.03044."""
    magnitudes = [2.0**-i for i in range(2 ** (bits - 1) - 1)]
    return Codebook(f"pow2_{bits}", bits, _signed_values(magnitudes))


def _sums_of_two_powers() -> Codebook:
    """Additive powers of two, arXiv:1909.13144 with k = 2, n = 2, and a sign."""
    first, second = (0.0, 1.0, 2.0**-2, 2.0**-4), (0.0, 2.0**-1, 2.0**-3, 2.0**-5)
    return Codebook("apot5", 5, _signed_values([a + b for a in first for b in second if a + b]))


def _dynamic_tree() -> Codebook:
    """Dynamic tree quantization in 8 bits, arXiv:2110.02861: bitsandbytes' table.

    The zeros that lead a code are a decimal exponent, from 10**-6 to 1, and the bits behind them
    the middles of equal parts of [0.1, 1]; 0 and 1 are values of their own.
    """
    magnitudes = []
    for i in range(7):
        ends = np.linspace(0.1, 1, 2**i + 1, dtype=np.float32)
        magnitudes += [float(m) for m in np.float32(10.0 ** (i - 6)) * ((ends[:-1] + ends[1:]) / 2)]
    return Codebook("dynamic8", 8, tuple(sorted([*_signed_values(magnitudes), 1.0])))


def _signed_values(magnitudes: list[float]) -> tuple[float, ...]:
    return tuple(sorted([0.0, *magnitudes, *(-m for m in magnitudes)]))


INT2: Final = _signed(2)
INT3: Final = _signed(3)
INT4: Final = _signed(4)
INT5: Final = _signed(5)
INT6: Final = _signed(6)
INT7: Final = _signed(7)
INT8: Final = _signed(8)
INT2_NARROW: Final = _signed(2, narrow=True)
INT3_NARROW: Final = _signed(3, narrow=True)
INT4_NARROW: Final = _signed(4, narrow=True)
INT5_NARROW: Final = _signed(5, narrow=True)
INT6_NARROW: Final = _signed(6, narrow=True)
INT7_NARROW: Final = _signed(7, narrow=True)
INT8_NARROW: Final = _signed(8, narrow=True)
UINT2: Final = _unsigned(2)
UINT3: Final = _unsigned(3)
UINT4: Final = _unsigned(4)
UINT5: Final = _unsigned(5)
UINT6: Final = _unsigned(6)
UINT7: Final = _unsigned(7)
UINT8: Final = _unsigned(8)
INT2_HALF: Final = _half(2)
INT3_HALF: Final = _half(3)
INT4_HALF: Final = _half(4)
INT5_HALF: Final = _half(5)
INT6_HALF: Final = _half(6)
INT7_HALF: Final = _half(7)
INT8_HALF: Final = _half(8)
TERNARY: Final = IntGrid("ternary", 2, qmin=-1, qmax=1, low=-1)
BINARY: Final = IntGrid("binary", 1, qmin=-1, qmax=1, low=-1, step=2)
# One bit of half-shifted levels is +-1/2: binary with half the scale, so it is the same format.
INT1: Final = BINARY
FP4_E2M1: Final = Minifloat("fp4_e2m1", 4, exponent_bits=2, mantissa_bits=1, largest=6.0)
FP6_E2M3: Final = Minifloat("fp6_e2m3", 6, exponent_bits=2, mantissa_bits=3, largest=7.5)
FP6_E3M2: Final = Minifloat("fp6_e3m2", 6, exponent_bits=3, mantissa_bits=2, largest=28.0)
FP8_E4M3: Final = Minifloat("fp8_e4m3", 8, exponent_bits=4, mantissa_bits=3, largest=448.0)
FP8_E5M2: Final = Minifloat("fp8_e5m2", 8, exponent_bits=5, mantissa_bits=2, largest=57344.0)
# The 16 values of QLoRA's NormalFloat (arXiv:2305.14314, appendix E).
NF4: Final = Codebook(
    "nf4",
    4,
    (
        -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453,
        -0.28444138169288635, -0.18477343022823334, -0.09105003625154495, 0.0,
        0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224,
        0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0,
    ),
)  # fmt: skip

POW2_3: Final = _powers_of_two(3)
POW2_4: Final = _powers_of_two(4)
APOT5: Final = _sums_of_two_powers()
# For scales (QLoRA's double quantization): 256 values are no format for weights.
DYNAMIC8: Final = _dynamic_tree()

# TTQ's -W_n, 0, W_p; the basis is (W_n, W_p).
TERNARY_LEARNED: Final = Learned("ternary_learned", 2, ((-1, 0), (0, 0), (0, 1)))
BASIS2: Final = signed_sums(2)
BASIS3: Final = signed_sums(3)
BASIS4: Final = signed_sums(4)
# Beside ALL, whose formats can be rounded to without an array of learned values.
LEARNED: Final = (TERNARY_LEARNED, BASIS2, BASIS3, BASIS4)

ALL: Final[tuple[Format, ...]] = (
    INT2, INT3, INT4, INT5, INT6, INT7, INT8, INT4_NARROW, INT8_NARROW,
    UINT2, UINT3, UINT4, UINT5, UINT6, UINT7, UINT8,
    INT2_HALF, TERNARY, BINARY, FP4_E2M1, FP8_E4M3, FP8_E5M2, NF4,
    INT2_NARROW, INT3_NARROW, INT5_NARROW, INT6_NARROW, INT7_NARROW,
    INT3_HALF, INT4_HALF, INT5_HALF, INT6_HALF, INT7_HALF, INT8_HALF,
    FP6_E2M3, FP6_E3M2, POW2_3, POW2_4, APOT5,
)  # fmt: skip
_BY_NAME: Final = {fmt.name: fmt for fmt in (*ALL, *LEARNED, DYNAMIC8)} | {"int1": INT1}


def get(name: str) -> Format:
    """The registered format of that name.

    Raises:
        ValueError: There is none; the message lists the nearest names.
    """
    if name not in _BY_NAME:
        near = difflib.get_close_matches(name, _BY_NAME, n=5, cutoff=0.3) or sorted(_BY_NAME)
        raise ValueError(f"no format is named {name!r}. Nearest: {near}.")
    return _BY_NAME[name]


def to_key(fmt: Format) -> str | dict[str, Any]:
    """What stands for a format in JSON: its name, or a codebook of one's own in full."""
    if _BY_NAME.get(fmt.name) == fmt:
        return fmt.name
    if not isinstance(fmt, Codebook):
        raise NotImplementedError(
            f"format {fmt.name!r} is not registered, and only codebooks are written in full; "
            "make it with formats.codebook(values)."
        )
    return {"name": fmt.name, "bits": fmt.bits, "values": list(fmt.values)}


def from_key(key: str | dict[str, Any]) -> Format:
    """The inverse of `to_key`.

    Raises:
        ValueError: An unknown name (the message lists the nearest), unknown or missing keys, or
            values that are no codebook.
    """
    if isinstance(key, str):
        return get(key)
    known = {"name", "bits", "values"}
    if set(key) != known:
        raise ValueError(f"codebook: keys {sorted(key)} are not {sorted(known)}.")
    return Codebook(key["name"], key["bits"], tuple(float(v) for v in key["values"]))
