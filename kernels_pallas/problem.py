"""What one packed product is: everything about it that is known before the arrays are.

    y[m, n] = sum_k x[m, k] * (level(code[k, n]) - zero_point[k // group, n]) * scale[k // group, n]

The codes lie in int32 planes of 8, 4, 2 and 1 bits, widest first and lowest bits in the first one;
a plane of width w packs `32 // w` consecutive codes along K into a word, lowest bits first, and K
is padded to a multiple of 32.
"""

import dataclasses
import functools
from typing import Any, Final, Literal

import jax.numpy as jnp
import ml_dtypes
import numpy as np

WORD: Final = 32
PLANES: Final[dict[int, tuple[int, ...]]] = {
    1: (1,), 2: (2,), 3: (2, 1), 4: (4,), 5: (4, 1), 6: (4, 2), 7: (4, 2, 1), 8: (8,),
}  # fmt: skip
E2M1: Final = (
    0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0, -0.0, -0.5, -1.0, -1.5, -2.0, -3.0, -4.0, -6.0,
)  # fmt: skip
_ACTS: Final = (None, "int8", "fp8")
_X_DTYPES: Final = ("bfloat16", "float16", "float32")


@dataclasses.dataclass(frozen=True)
class Affine:
    """Code c stands for `c * step + low`.

    Attributes:
        low: The level of code 0.
        step: Distance of two levels.
        count: Codes in use are `[0, count)`; None: all of them. Ternary has three of four, and with
            that known -1, 0 and 1 are made without an addition.
    """

    low: float
    step: float = 1.0
    count: int | None = None


@dataclasses.dataclass(frozen=True)
class Table:
    """Code c stands for `values[c]`: NF4, FP4 e2m1, learned codebooks of at most 16 entries."""

    values: tuple[float, ...]


Levels = Affine | Table


@dataclasses.dataclass(frozen=True, kw_only=True)
class Problem:
    """One packed product, as far as it is static; hashable.

    Attributes:
        bits: Width of one code, in bits, 1 to 8.
        levels: What number a code stands for.
        k: Length of the contraction, in elements, without padding.
        n: Outputs.
        group: Elements along K that share a scale; `k` where a column has one.
        zero_points: Whether each group has an integer zero point in `[0, 2**bits)`.
        act: None multiplies `x` as it is; "int8" and "fp8" (e4m3) round each row of it first.
        x_dtype: Of the activations: bfloat16, float16 or float32.
        out_dtype: Of the result.

    Raises:
        ValueError: A field that no product can have; the message names it.
    """

    bits: int
    levels: Levels
    k: int
    n: int
    group: int
    zero_points: bool = False
    act: Literal["int8", "fp8"] | None = None
    x_dtype: Any = jnp.bfloat16
    out_dtype: Any = jnp.bfloat16

    def __post_init__(self) -> None:
        object.__setattr__(self, "x_dtype", jnp.dtype(self.x_dtype))
        object.__setattr__(self, "out_dtype", jnp.dtype(self.out_dtype))
        if self.bits not in PLANES:
            raise ValueError(f"Problem: codes have 1 to 8 bits, not {self.bits}.")
        if self.k < 1 or self.n < 1:
            raise ValueError(f"Problem: a kernel of {self.k} x {self.n} is empty.")
        if self.group < 1 or self.k % self.group:
            raise ValueError(
                f"Problem: K of {self.k} does not split into groups of {self.group} "
                f"({self.k} = {self.k // max(self.group, 1)} * {self.group} + "
                f"{self.k % max(self.group, 1)}). Use group={self.k} for one scale a column."
            )
        if self.act not in _ACTS:
            raise ValueError(f"Problem: act is one of {_ACTS}, not {self.act!r}.")
        if self.x_dtype.name not in _X_DTYPES:
            raise ValueError(f"Problem: x is one of {_X_DTYPES}, not {self.x_dtype.name}.")
        if isinstance(self.levels, Table) and len(self.levels.values) != 2**self.bits:
            raise ValueError(
                f"Problem: a table of {len(self.levels.values)} entries for codes of {self.bits} "
                f"bits; it takes {2**self.bits}."
            )
        if isinstance(self.levels, Affine) and not 1 <= self.codes <= 2**self.bits:
            raise ValueError(f"Problem: {self.codes} codes do not fit {self.bits} bits.")

    @property
    def widths(self) -> tuple[int, ...]:
        """Widths of the planes, in bits, widest first."""
        return PLANES[self.bits]

    @property
    def codes(self) -> int:
        """Number of codes in use."""
        count = self.levels.count if isinstance(self.levels, Affine) else None
        return 2**self.bits if count is None else count

    @property
    def groups(self) -> int:
        """Scales along K."""
        return self.k // self.group

    @property
    def padded_k(self) -> int:
        """K of the canonical words, in codes: a multiple of 32."""
        return -(-self.k // WORD) * WORD

    def plane_shape(self, width: int) -> tuple[int, int]:
        """Shape of the canonical plane of `width` bits."""
        return self.padded_k * width // WORD, self.n


def level_values(problem: Problem) -> np.ndarray:
    """The number each code in use stands for, float64 [codes]."""
    if isinstance(problem.levels, Table):
        return np.asarray(problem.levels.values, np.float64)
    codes = np.arange(problem.codes, dtype=np.float64)
    return codes * problem.levels.step + problem.levels.low


@functools.cache
def weight_values(problem: Problem) -> np.ndarray:
    """Every value that level - zero_point can take, float64, ascending."""
    values = level_values(problem)
    if problem.zero_points:
        zeros = np.arange(2**problem.bits, dtype=np.float64)
        values = (values[:, None] - zeros[None, :]).ravel()
    return np.unique(values)


def integer_multiplier(problem: Problem) -> int | None:
    """The smallest power of two, up to 8, that makes every level an integer; None if none does."""
    values = level_values(problem)
    for multiplier in (1, 2, 4, 8):
        if np.all(values * multiplier == np.round(values * multiplier)):
            return multiplier
    return None


def representable(values: np.ndarray, dtype: Any) -> bool:
    """Whether the dtype holds every value exactly."""
    return bool(np.all(values.astype(dtype).astype(np.float64) == values))


def bfloat16_parts(problem: Problem) -> int | None:
    """How many bfloat16 numbers sum to a weight exactly: 1, 2 or 3; None if even 3 do not.

    Integers of 8 bits and FP4 take one. NF4's levels are float32 numbers of 24 bits, which is three
    times bfloat16's 8.
    """
    rest = weight_values(problem)
    for count in range(1, 4):
        # Truncation, as in the kernels: what is left then has the same sign and fewer bits.
        high = (rest.astype(np.float32).view(np.uint32) & np.uint32(0xFFFF0000)).view(np.float32)
        rest = rest - high.astype(ml_dtypes.bfloat16).astype(np.float64)
        if not np.any(rest):
            return count
    return None
