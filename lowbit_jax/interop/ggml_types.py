"""How ggml stores numbers: blocks of a row, and what each block decodes to.

A tensor is rows of `block` elements at a time, `size` bytes each. Decoded here are the float types;
those of `codecs.ggml_blocks` are one float32 product of code and scale, as ggml computes it. The
sizes of the other types are known too, so that a file that holds some can be checked, and refused
by name.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Final

import numpy as np
from jaxtyping import Float32, UInt8

from lowbit_jax.interop.codecs.ggml_blocks import dequantize

Bytes = UInt8[np.ndarray, " size"]
Values = Float32[np.ndarray, " n"]


@dataclasses.dataclass(frozen=True)
class GGMLType:
    """One way to store a row.

    name: ggml's name.
    block: Elements that are stored together; a row is a whole number of blocks.
    size: Bytes of one block.
    decode: uint8 [blocks * size] -> new float32 [blocks * block]; None where it is not known here.
    """

    name: str
    block: int
    size: int
    decode: Callable[[Bytes], Values] | None = None


def _f32(data: Bytes) -> Values:
    return data.view("<f4").astype(np.float32)


def _f16(data: Bytes) -> Values:
    return data.view("<f2").astype(np.float32)


def _bf16(data: Bytes) -> Values:
    # A bfloat16 is the upper half of a float32.
    return (data.view("<u2").astype(np.uint32) << 16).view(np.float32)


def _blocks(name: str) -> Callable[[Bytes], Values]:
    return functools.partial(dequantize, type=name)


# By the number that stands in the file. Numbers left out were given up by ggml.
TYPES: Final[dict[int, GGMLType]] = {
    0: GGMLType("F32", 1, 4, _f32),
    1: GGMLType("F16", 1, 2, _f16),
    2: GGMLType("Q4_0", 32, 18, _blocks("Q4_0")),
    3: GGMLType("Q4_1", 32, 20),
    6: GGMLType("Q5_0", 32, 22),
    7: GGMLType("Q5_1", 32, 24),
    8: GGMLType("Q8_0", 32, 34, _blocks("Q8_0")),
    9: GGMLType("Q8_1", 32, 36),
    10: GGMLType("Q2_K", 256, 84),
    11: GGMLType("Q3_K", 256, 110),
    12: GGMLType("Q4_K", 256, 144),
    13: GGMLType("Q5_K", 256, 176),
    14: GGMLType("Q6_K", 256, 210),
    15: GGMLType("Q8_K", 256, 292),
    16: GGMLType("IQ2_XXS", 256, 66),
    17: GGMLType("IQ2_XS", 256, 74),
    18: GGMLType("IQ3_XXS", 256, 98),
    19: GGMLType("IQ1_S", 256, 50),
    20: GGMLType("IQ4_NL", 32, 18),
    21: GGMLType("IQ3_S", 256, 110),
    22: GGMLType("IQ2_S", 256, 82),
    23: GGMLType("IQ4_XS", 256, 136),
    24: GGMLType("I8", 1, 1),
    25: GGMLType("I16", 1, 2),
    26: GGMLType("I32", 1, 4),
    27: GGMLType("I64", 1, 8),
    28: GGMLType("F64", 1, 8),
    29: GGMLType("IQ1_M", 256, 56),
    30: GGMLType("BF16", 1, 2, _bf16),
    34: GGMLType("TQ1_0", 256, 54, _blocks("TQ1_0")),
    35: GGMLType("TQ2_0", 256, 66, _blocks("TQ2_0")),
    39: GGMLType("MXFP4", 32, 17, _blocks("MXFP4")),
    40: GGMLType("NVFP4", 64, 36),
}
