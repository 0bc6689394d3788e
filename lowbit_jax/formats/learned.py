"""Formats whose values are learned: the array that they are made of lies beside the codes.

An ordinary format's values are constants. Here a code says which of a few learned numbers, the
basis, are added and which are subtracted:

    value of code c = sum over p of matrix[c][p] * basis[p],      matrix[c][p] in {-1, 0, 1}.

TTQ's ternary weights (-W_n, 0, W_p) have a basis of two, LQ-Nets' K-bit ones (v_1 +- v_2 .. ) one
of K. The basis is an array [..., P * blocks along K, blocks along N] of the `QTensor`, one column
of P numbers per scale: the P rows of a block lie next to each other.
"""

import dataclasses
import itertools
from collections.abc import Sequence
from typing import NoReturn, override

import jax.numpy as jnp
import numpy as np
from jax.lax import optimization_barrier as pinned
from jaxtyping import Array, Float, UInt8

from lowbit_jax.formats.types import Format
from lowbit_jax.rounding import flushed, positive_zero


@dataclasses.dataclass(frozen=True)
class Learned(Format):
    """Values that are sums and differences of a learned basis.

    Rounding: nearest; in the middle of two values the lower one. Without a
    basis it has no values: `round`, `encode` and `decode` are refused, and so is whatever takes the
    values of a format for constants (kernels, files of other projects, searches of a range).

    Attributes:
        matrix: For every code, the factor of each number of the basis: -1, 0 or 1.

    Raises:
        ValueError: A factor of another value, rows of different lengths, or too many codes.
    """

    matrix: tuple[tuple[int, ...], ...]

    def __post_init__(self):
        lengths = {len(row) for row in self.matrix}
        factors = set(itertools.chain.from_iterable(self.matrix))
        if len(lengths) != 1 or not factors <= {-1, 0, 1}:
            raise ValueError(f"{self.name}: rows of {sorted(lengths)} factors, {sorted(factors)}.")
        if not 2 <= len(self.matrix) <= 2**self.bits:
            raise ValueError(f"{self.name}: {len(self.matrix)} codes do not fit {self.bits} bits.")

    @property
    def basis_size(self) -> int:
        """P: how many numbers a block learns."""
        return len(self.matrix[0])

    def basis_shape(self, scale_shape: Sequence[int]) -> tuple[int, ...]:
        """Shape of the basis of an array whose scale has this shape."""
        *lead, k, n = scale_shape
        return (*lead, k * self.basis_size, n)

    def values(self, basis: Float[Array, "... p n"]) -> list[Float[Array, "... k n"]]:
        """The value of every code, each in the shape of the scale.

        Subnormal numbers are zeros, and zero is +0.0. Sums run in the order of the basis: no
        program may change their last bit.
        """
        *lead, rows, n = basis.shape
        split = basis.astype(jnp.float32).reshape(*lead, rows // self.basis_size, -1, n)
        parts = [flushed(split[..., p, :]) for p in range(self.basis_size)]
        table = []
        for factors in self.matrix:
            total = jnp.zeros_like(parts[0])
            for factor, part in zip(factors, parts, strict=True):
                if factor:
                    total = total + part if factor > 0 else total - part
            table.append(positive_zero(flushed(total)))
        return table

    def nearest(self, v: Array, table: Sequence[Array]) -> tuple[Array, UInt8[Array, "*n"]]:
        """The nearest value of each element, and its code; NaN stays NaN, with code 0.

        Args:
            v: float32.
            table: The values of the codes, in any order, all of one shape that broadcasts against
                `v`.
        """
        stacked = jnp.stack(table)
        order = jnp.argsort(stacked, axis=0, stable=True)
        ascending = pinned(jnp.take_along_axis(stacked, order, axis=0))
        codes = [order[0]]
        for i in range(1, len(table)):  # of equal values, the lowest code
            same = ascending[i] == ascending[i - 1]
            codes.append(pinned(jnp.where(same, codes[-1], order[i])))
        # Each step uses the last one's result once: XLA computes a chain again for every use.
        best, code = ascending[0], codes[0]
        for i in range(1, len(table)):
            above = v > pinned((ascending[i - 1] + ascending[i]) * np.float32(0.5))
            best, code = jnp.where(above, ascending[i], best), jnp.where(above, codes[i], code)
        code = jnp.where(jnp.isnan(v), 0, code)
        return jnp.where(jnp.isnan(v), v, best), code.astype(jnp.uint8)

    def look_up(self, code: UInt8[Array, "*n"], table: Sequence[Array]) -> Float[Array, "*n"]:
        """The value that each code stands for; codes of nothing are the last's."""
        value = jnp.broadcast_to(table[-1], code.shape)
        for index, each in enumerate(table[:-1]):
            value = jnp.where(code == index, each, value)
        return value

    def _refuse(self, what: str) -> NoReturn:
        raise NotImplementedError(
            f"{self.name}: its values are learned and lie in the QTensor, so that {what} of the "
            "format alone is not defined. Use q.dequantize(), or a format of constant values."
        )

    @property
    @override
    def max(self) -> float:
        self._refuse("a largest magnitude")

    @property
    @override
    def half_range(self) -> float:
        self._refuse("a range")

    @property
    @override
    def zero_code(self) -> int:
        zeros = (0,) * self.basis_size
        return self.matrix.index(zeros) if zeros in self.matrix else 0

    @override
    def round(self, v: Float[Array, "*n"]) -> Float[Array, "*n"]:
        self._refuse("rounding")

    @override
    def encode(self, v: Float[Array, "*n"]) -> UInt8[Array, "*n"]:
        self._refuse("encoding")

    @override
    def decode(self, code: UInt8[Array, "*n"]) -> Float[Array, "*n"]:
        self._refuse("decoding")


def signed_sums(bits: int) -> Learned:
    """+-v_1 +-v_2 .. +-v_bits: bit p of a code is the sign of v_(p + 1), 1 for plus."""
    rows = [tuple(2 * (code >> p & 1) - 1 for p in range(bits)) for code in range(2**bits)]
    return Learned(f"basis{bits}", bits, tuple(rows))
