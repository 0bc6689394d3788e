"""The kinds of formats: integer grids, small floats, codebooks."""

import abc
import dataclasses
import zlib
from collections.abc import Sequence
from typing import Final, override

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, UInt8

from lowbit_jax.rounding import exp2, exponent_of, flushed, positive_zero, round_minifloat

_MOST_COMPARISONS: Final = 31


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

    Raises:
        ValueError: Values that are not finite, not ascending, given twice, or too many.
    """

    values: tuple[float, ...]

    def __post_init__(self):
        table = np.asarray(self.values, np.float32)
        if not np.isfinite(table).all():
            wrong = table[~np.isfinite(table)][0]
            raise ValueError(f"{self.name}: a codebook holds finite values, not {wrong}.")
        if not 2 <= table.size <= 2**self.bits:
            raise ValueError(
                f"{self.name}: {table.size} values do not fit codes of {self.bits} bits, which "
                f"tell 2 to {2**self.bits} values apart."
            )
        if (np.diff(table) <= 0).any():
            i = int(np.argmax(np.diff(table) <= 0))
            raise ValueError(
                f"{self.name}: a codebook ascends, each float32 value once, but {table[i]} is "
                f"followed by {table[i + 1]} (entries {i} and {i + 1}). Give sorted(set(values))."
            )

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
        if len(middles) > _MOST_COMPARISONS:
            found = jnp.searchsorted(jnp.asarray(middles), v)
            return jnp.where(jnp.isnan(v), 0, found).astype(jnp.uint8)  # as comparisons have it
        index = jnp.zeros(v.shape, jnp.int32)
        for middle in middles:  # comparisons vectorise; a search of the table gathers
            index += (v > middle).astype(jnp.int32)
        return index.astype(jnp.uint8)

    @override
    def decode(self, code: UInt8[Array, "*n"]) -> Float[Array, "*n"]:
        return jnp.take(jnp.asarray(self.values, jnp.float32), code.astype(jnp.int32), mode="clip")


def codebook(values: Sequence[float], name: str | None = None) -> Codebook:
    """A format of one's own values, ascending; it needs no registration and travels in a spec.

    Scales are `absmax / max |value|`; the narrowest code that tells the values apart is used.

    Args:
        values: 2 to 256 finite values, each once.
        name: Default: one made of the values.

    Raises:
        ValueError: See `Codebook`.

    Example:
        >>> codebook([-1.0, -0.3, 0.0, 0.3, 1.0]).bits
        3
    """
    table = tuple(float(v) + 0.0 for v in np.asarray(values, np.float32))  # no minus zero
    digest = zlib.crc32(np.asarray(table, np.float32).tobytes())
    bits = min(max(len(table) - 1, 1).bit_length(), 8)
    return Codebook(name or f"codebook{len(table)}_{digest:08x}", bits, table)
