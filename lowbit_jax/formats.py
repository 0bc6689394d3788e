"""Formats: the finite sets of reals that one code can stand for.

A format knows nothing of scales, groups or arrays' shapes; it rounds a number that is already in
units of the scale. All arithmetic is float32, and zero is always +0.0, so that two ways of
computing a value agree bit for bit.

| name          | bits | values                                        | code c stands for        |
|---------------|------|-----------------------------------------------|--------------------------|
| int2 .. int8  | b    | -2**(b-1) .. 2**(b-1) - 1                     | c - 2**(b-1)             |
| int4_narrow … | b    | -(2**(b-1) - 1) .. 2**(b-1) - 1               | c - 2**(b-1)             |
| uint2 .. uint8| b    | 0 .. 2**b - 1, shifted by an integer zero point | c                      |
| int2_half     | 2    | -1.5, -0.5, 0.5, 1.5                          | c - 1.5                  |
| ternary       | 2    | -1, 0, 1                                      | c - 1                    |
| binary        | 1    | -1, 1                                         | 2 c - 1                  |
| fp4_e2m1      | 4    | 0, .5, 1, 1.5, 2, 3, 4, 6, and negative       | sign, exponent, mantissa |
| fp8_e4m3      | 8    | 0, 2**-9 .. 448, and negative                 | sign, exponent, mantissa |
| fp8_e5m2      | 8    | 0, 2**-16 .. 57344, and negative              | sign, exponent, mantissa |
| nf4           | 4    | 16 quantiles of the normal distribution       | the c-th, ascending      |
"""

import abc
import dataclasses
import difflib
from typing import Final, override

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, UInt8

from lowbit_jax.rounding import exp2, exponent_of, flushed, positive_zero, round_minifloat


@dataclasses.dataclass(frozen=True)
class Format(abc.ABC):
    """A finite set of reals that one code can stand for.

    Law: `decode(encode(v)) == round(v)` for every finite `v`.

    Attributes:
        name: Registry key, written to checkpoints.
        bits: Width of one code, 1 to 8 (ternary: 2).
    """

    name: str
    bits: int

    @property
    @abc.abstractmethod
    def max(self) -> float:
        """Largest magnitude."""

    @property
    @abc.abstractmethod
    def half_range(self) -> float:
        """Half the distance from the smallest to the largest value."""

    @property
    @abc.abstractmethod
    def zero_code(self) -> int:
        """The code of zero, with which K is padded; 0 where the format has no zero."""

    @abc.abstractmethod
    def round(self, v: Float[Array, "*n"]) -> Float[Array, "*n"]:
        """Nearest value of the format, ties to even, saturating; NaN stays NaN."""

    @abc.abstractmethod
    def encode(self, v: Float[Array, "*n"]) -> UInt8[Array, "*n"]:
        """The code, in `[0, 2**bits)`, of the nearest value."""

    @abc.abstractmethod
    def decode(self, code: UInt8[Array, "*n"]) -> Float[Array, "*n"]:
        """The value, in float32, that a code stands for."""


@dataclasses.dataclass(frozen=True)
class IntGrid(Format):
    """Equidistant values `qmin, qmin + step, .. qmax`; code c stands for `low + step * c`.

    Rounding: nearest; ties to even, or upwards where the levels are half-shifted; in binary, zero
    rounds to +1.

    Attributes:
        qmin: Smallest value.
        qmax: Largest value.
        low: Value of code 0; below `qmin` where codes are left unused (narrow ranges).
        step: Distance between neighbours.
        signed: Whether the grid stands alone; an unsigned one is read relative to an integer zero
            point.
    """

    qmin: float
    qmax: float
    low: float
    step: int = 1
    signed: bool = True

    @property
    @override
    def max(self) -> float:
        return max(abs(self.qmin), abs(self.qmax))

    @property
    @override
    def half_range(self) -> float:
        return (self.qmax - self.qmin) / 2

    @property
    def levels(self) -> int:
        """How many values the grid has."""
        return int((self.qmax - self.qmin) / self.step) + 1

    @property
    @override
    def zero_code(self) -> int:
        code = -self.low / self.step
        return int(code) if code.is_integer() and self.qmin <= 0 <= self.qmax else 0

    @override
    def round(self, v: Float[Array, "*n"]) -> Float[Array, "*n"]:
        if self.step == 2:
            v, one = flushed(v), jnp.ones_like(v)
            return jnp.where(v >= 0, one, jnp.where(v < 0, -one, v))
        # Half-shifted: a subtraction before the rounding would fuse with the division by the scale.
        v = jnp.floor(flushed(v)) + np.float32(0.5) if self.qmin % 1 else jnp.round(v)
        return positive_zero(jnp.clip(v, np.float32(self.qmin), np.float32(self.qmax)))

    @override
    def encode(self, v: Float[Array, "*n"]) -> UInt8[Array, "*n"]:
        # The difference is an exact small integer; halving it is exact too.
        index = (self.round(v) - np.float32(self.low)) * np.float32(1 / self.step)
        return index.astype(jnp.int32).astype(jnp.uint8)

    @override
    def decode(self, code: UInt8[Array, "*n"]) -> Float[Array, "*n"]:
        return code.astype(jnp.float32) * np.float32(self.step) + np.float32(self.low)


@dataclasses.dataclass(frozen=True)
class Minifloat(Format):
    """A small float: 1 sign, `exponent_bits`, `mantissa_bits`; subnormals, no infinities, no NaN.

    Rounding: nearest, ties to even mantissa, saturating at `largest`. The code of zero is always 0
    (never minus zero). Codes above that of `largest`, where 8-bit formats keep infinities and NaN
    (OCP OFP8), are never encoded.

    Attributes:
        exponent_bits: Bits of the exponent, biased by `2**(exponent_bits - 1) - 1`.
        mantissa_bits: Stored bits of the mantissa.
        largest: Largest magnitude.
    """

    exponent_bits: int
    mantissa_bits: int
    largest: float

    @property
    @override
    def max(self) -> float:
        return self.largest

    @property
    @override
    def half_range(self) -> float:
        return self.largest

    @property
    @override
    def zero_code(self) -> int:
        return 0

    @property
    def min_exponent(self) -> int:
        """Exponent of the smallest normal number."""
        return 2 - 2 ** (self.exponent_bits - 1)

    @override
    def round(self, v: Float[Array, "*n"]) -> Float[Array, "*n"]:
        return round_minifloat(
            v,
            mantissa_bits=self.mantissa_bits,
            min_exponent=self.min_exponent,
            largest=self.largest,
        )

    @override
    def encode(self, v: Float[Array, "*n"]) -> UInt8[Array, "*n"]:
        v = self.round(v)
        exponent = jnp.maximum(exponent_of(v), self.min_exponent)
        mantissa = (jnp.abs(v) * exp2(self.mantissa_bits - exponent)).astype(jnp.int32)
        # A normal mantissa carries its leading one into the exponent field; a subnormal one leaves
        # that field 0.
        magnitude = ((exponent - self.min_exponent) << self.mantissa_bits) + mantissa
        sign = (v < 0).astype(jnp.int32) << (self.bits - 1)
        return (sign + magnitude).astype(jnp.uint8)

    @override
    def decode(self, code: UInt8[Array, "*n"]) -> Float[Array, "*n"]:
        code = code.astype(jnp.int32)
        field = (code >> self.mantissa_bits) & (2**self.exponent_bits - 1)
        mantissa = (code & (2**self.mantissa_bits - 1)) + jnp.where(
            field > 0, 2**self.mantissa_bits, 0
        )
        exponent = jnp.maximum(field, 1) + (self.min_exponent - 1 - self.mantissa_bits)
        magnitude = mantissa.astype(jnp.float32) * exp2(exponent)
        return jnp.where((code >> (self.bits - 1)) & 1 == 1, -magnitude, magnitude)


@dataclasses.dataclass(frozen=True)
class Codebook(Format):
    """Arbitrary ascending values; code c stands for the c-th.

    Rounding: nearest; a value in the middle of two neighbours goes to the lower one, bitsandbytes'
    rule.

    Attributes:
        values: The values, ascending, at most `2**bits`.
    """

    values: tuple[float, ...]

    @property
    @override
    def max(self) -> float:
        return max(abs(v) for v in self.values)

    @property
    @override
    def half_range(self) -> float:
        return self.max

    @property
    @override
    def zero_code(self) -> int:
        return self.values.index(0.0) if 0.0 in self.values else 0

    @override
    def round(self, v: Float[Array, "*n"]) -> Float[Array, "*n"]:
        return jnp.where(jnp.isnan(v), v, self.decode(self.encode(v)))

    @override
    def encode(self, v: Float[Array, "*n"]) -> UInt8[Array, "*n"]:
        table = np.asarray(self.values, np.float32)
        middles = (table[1:] + table[:-1]) * np.float32(0.5)
        index = jnp.zeros(v.shape, jnp.int32)
        for middle in middles:  # 15 comparisons vectorise; a search of the table would gather
            index += (v > middle).astype(jnp.int32)
        return index.astype(jnp.uint8)

    @override
    def decode(self, code: UInt8[Array, "*n"]) -> Float[Array, "*n"]:
        return jnp.take(jnp.asarray(self.values, jnp.float32), code.astype(jnp.int32), mode="clip")


def _signed(bits: int, narrow: bool = False) -> IntGrid:
    half = 2 ** (bits - 1)
    name = f"int{bits}_narrow" if narrow else f"int{bits}"
    return IntGrid(name, bits, qmin=1 - half if narrow else -half, qmax=half - 1, low=-half)


def _unsigned(bits: int) -> IntGrid:
    return IntGrid(f"uint{bits}", bits, qmin=0, qmax=2**bits - 1, low=0, signed=False)


INT2: Final = _signed(2)
INT3: Final = _signed(3)
INT4: Final = _signed(4)
INT5: Final = _signed(5)
INT6: Final = _signed(6)
INT7: Final = _signed(7)
INT8: Final = _signed(8)
INT4_NARROW: Final = _signed(4, narrow=True)
INT8_NARROW: Final = _signed(8, narrow=True)
UINT2: Final = _unsigned(2)
UINT3: Final = _unsigned(3)
UINT4: Final = _unsigned(4)
UINT5: Final = _unsigned(5)
UINT6: Final = _unsigned(6)
UINT7: Final = _unsigned(7)
UINT8: Final = _unsigned(8)
INT2_HALF: Final = IntGrid("int2_half", 2, qmin=-1.5, qmax=1.5, low=-1.5)
TERNARY: Final = IntGrid("ternary", 2, qmin=-1, qmax=1, low=-1)
BINARY: Final = IntGrid("binary", 1, qmin=-1, qmax=1, low=-1, step=2)
FP4_E2M1: Final = Minifloat("fp4_e2m1", 4, exponent_bits=2, mantissa_bits=1, largest=6.0)
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

ALL: Final[tuple[Format, ...]] = (
    INT2, INT3, INT4, INT5, INT6, INT7, INT8, INT4_NARROW, INT8_NARROW,
    UINT2, UINT3, UINT4, UINT5, UINT6, UINT7, UINT8,
    INT2_HALF, TERNARY, BINARY, FP4_E2M1, FP8_E4M3, FP8_E5M2, NF4,
)  # fmt: skip
_BY_NAME: Final = {fmt.name: fmt for fmt in ALL}


def get(name: str) -> Format:
    """The registered format of that name.

    Raises:
        ValueError: There is none; the message lists the nearest names.
    """
    if name not in _BY_NAME:
        near = difflib.get_close_matches(name, _BY_NAME, n=5, cutoff=0.3) or sorted(_BY_NAME)
        raise ValueError(f"no format is named {name!r}. Nearest: {near}.")
    return _BY_NAME[name]
