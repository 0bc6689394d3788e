"""Formats: the finite sets of reals that one code can stand for.

A format knows nothing of scales, groups or arrays' shapes; it rounds a number that is already in
units of the scale. All arithmetic is float32, and zero is always +0.0, so that two ways of
computing a value agree bit for bit.

| name          | bits | values                                        | code c stands for        |
|---------------|------|-----------------------------------------------|--------------------------|
| int2 .. int8  | b    | -2**(b-1) .. 2**(b-1) - 1                     | c - 2**(b-1)             |
| int2_narrow … | b    | -(2**(b-1) - 1) .. 2**(b-1) - 1               | c - 2**(b-1)             |
| uint2 .. uint8| b    | 0 .. 2**b - 1, shifted by an integer zero point | c                      |
| int2_half ..  | b    | -2**(b-1) + .5 .. 2**(b-1) - .5               | c - 2**(b-1) + .5        |
| ternary       | 2    | -1, 0, 1                                      | c - 1                    |
| binary        | 1    | -1, 1                                         | 2 c - 1                  |
| fp4_e2m1      | 4    | 0, .5, 1, 1.5, 2, 3, 4, 6, and negative       | sign, exponent, mantissa |
| fp6_e2m3      | 6    | 0, 2**-3 .. 7.5, and negative                 | sign, exponent, mantissa |
| fp6_e3m2      | 6    | 0, 2**-4 .. 28, and negative                  | sign, exponent, mantissa |
| fp8_e4m3      | 8    | 0, 2**-9 .. 448, and negative                 | sign, exponent, mantissa |
| fp8_e5m2      | 8    | 0, 2**-16 .. 57344, and negative              | sign, exponent, mantissa |
| nf4           | 4    | 16 quantiles of the normal distribution       | the c-th, ascending      |
| pow2_3, pow2_4| b    | 0 and +-2**-i, i = 0 .. 2**(b-1) - 2          | the c-th, ascending      |
| apot5         | 5    | 0, +-(p + q); p: 0, 1, 1/4, 1/16, q: half of p | the c-th, ascending     |
| dynamic8      | 8    | 0, 1, +-10**-6 .. 1 in steps that grow        | the c-th, ascending      |
| codebook(...) | 1..8 | one's own                                     | the c-th, ascending      |
| ternary_learned | 2  | -W_n, 0, W_p, learned                         | the c-th                 |
| basis2 .. basis4 | b | +-v_1 .. +-v_b, learned                       | bit p: the sign of v_p+1 |

int1 is binary: half-shifted levels of one bit differ from it by a factor of the scale. The
stretched ternary and 2-bit levels of ParetoQ (arXiv:2502.02631) are `ternary` and `int2_half` with
scales of 2/3 and 1/2 of its alpha; only its gradient is its own (`quantizers.StretchedElastic`).
"""

from lowbit_jax.formats.learned import Learned, signed_sums
from lowbit_jax.formats.normal import normal_codebook
from lowbit_jax.formats.registry import (
    ALL,
    APOT5,
    BASIS2,
    BASIS3,
    BASIS4,
    BINARY,
    DYNAMIC8,
    FP4_E2M1,
    FP6_E2M3,
    FP6_E3M2,
    FP8_E4M3,
    FP8_E5M2,
    INT1,
    INT2,
    INT2_HALF,
    INT2_NARROW,
    INT3,
    INT3_HALF,
    INT3_NARROW,
    INT4,
    INT4_HALF,
    INT4_NARROW,
    INT5,
    INT5_HALF,
    INT5_NARROW,
    INT6,
    INT6_HALF,
    INT6_NARROW,
    INT7,
    INT7_HALF,
    INT7_NARROW,
    INT8,
    INT8_HALF,
    INT8_NARROW,
    LEARNED,
    NF4,
    POW2_3,
    POW2_4,
    TERNARY,
    TERNARY_LEARNED,
    UINT2,
    UINT3,
    UINT4,
    UINT5,
    UINT6,
    UINT7,
    UINT8,
    from_key,
    get,
    to_key,
)
from lowbit_jax.formats.types import Codebook, Format, IntGrid, Minifloat, codebook

__all__ = [
    "ALL",
    "APOT5",
    "BASIS2",
    "BASIS3",
    "BASIS4",
    "BINARY",
    "DYNAMIC8",
    "FP4_E2M1",
    "FP6_E2M3",
    "FP6_E3M2",
    "FP8_E4M3",
    "FP8_E5M2",
    "INT1",
    "INT2",
    "INT2_HALF",
    "INT2_NARROW",
    "INT3",
    "INT3_HALF",
    "INT3_NARROW",
    "INT4",
    "INT4_HALF",
    "INT4_NARROW",
    "INT5",
    "INT5_HALF",
    "INT5_NARROW",
    "INT6",
    "INT6_HALF",
    "INT6_NARROW",
    "INT7",
    "INT7_HALF",
    "INT7_NARROW",
    "INT8",
    "INT8_HALF",
    "INT8_NARROW",
    "LEARNED",
    "NF4",
    "POW2_3",
    "POW2_4",
    "TERNARY",
    "TERNARY_LEARNED",
    "UINT2",
    "UINT3",
    "UINT4",
    "UINT5",
    "UINT6",
    "UINT7",
    "UINT8",
    "Codebook",
    "Format",
    "IntGrid",
    "Learned",
    "Minifloat",
    "codebook",
    "from_key",
    "get",
    "normal_codebook",
    "signed_sums",
    "to_key",
]
