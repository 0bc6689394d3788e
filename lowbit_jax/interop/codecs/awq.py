"""AWQ's GEMM layout (4 bits).

    qweight  int32 [K, N / 8]    eight columns a word, in the order 0 2 4 6 1 3 5 7 from the lowest
                                 bits up
    qzeros   int32 [G, N / 8]    zero points in the same order
    scales   [G, N]
    W[k, n] = (code[k, n] - zero[k // group, n]) * scale[k // group, n]

The other layouts (GEMV, TinyChat) keep other arrays and are not read.
"""

from collections.abc import Mapping
from typing import Final

import numpy as np

from lowbit_jax.interop.codecs.bitstreams import from_stream, to_stream
from lowbit_jax.interop.codecs.integers import grouped, spec_of_zeros, zeros_of
from lowbit_jax.interop.codecs.parts import (
    DoesNotFit,
    Kernel,
    codes_of,
    grouping,
    make_qtensor,
    refuse,
    require,
    scale_format_of,
    scale_of,
    stored_scales,
    take,
)
from lowbit_jax.scale_formats import FLOAT16, ScaleFormat

PARTS: Final = ("qweight", "qzeros", "scales")
_PER_WORD: Final = 8
_ORDER: Final = (0, 2, 4, 6, 1, 3, 5, 7)  # column of each field, from the lowest bits up
_NEAREST: Final = "w4a16_g128_asym or w4a16_g128"


def decode(tensors: Mapping[str, np.ndarray], *, where: str) -> Kernel:
    """The kernel in a layer's `PARTS`.

    Raises:
        ValueError: The tensors do not belong together.
        NotImplementedError: A last group that is shorter.
    """
    qweight, scale = take(tensors, "qweight", where, 2), take(tensors, "scales", where, 2)
    qzeros = take(tensors, "qzeros", where, 2)
    (k, words), groups = qweight.shape, scale.shape[0]
    n = words * _PER_WORD
    if not k or not n:
        raise ValueError(f"{where}: qweight is empty, {qweight.shape}.")
    require(qweight, "qweight", where, dtype=np.int32)
    require(qzeros, "qzeros", where, dtype=np.int32, shape=(groups, words))
    require(scale, "scales", where, dtype=scale.dtype, shape=(groups, n))
    granularity = grouping(k, groups, where)
    zeros = _columns(from_stream(qzeros, 4, n, axis=1))
    found = spec_of_zeros(zeros, 4, granularity, scale_format_of(scale, where))
    codes = _columns(from_stream(qweight, 4, n, axis=1))
    return Kernel(make_qtensor(codes, found.spec, scale, zero_point=found.zero_point, where=where))


def encode(
    kernel: Kernel, *, where: str, scale_format: ScaleFormat = FLOAT16
) -> dict[str, np.ndarray]:
    """A layer's tensors: the inverse of `decode`.

    Raises:
        NotImplementedError: The format has no such scheme.
        DoesNotFit: Columns do not fill words.
        ValueError: A scale that the format of scales does not have.
    """
    q = kernel.qtensor
    if q.spec.bits != 4:
        refuse(q.spec, "AWQ", "codes have 4 bits", _NEAREST)
    zeros = grouped(zeros_of(q, "AWQ", _NEAREST), q)
    if kernel.input_permutation is not None:
        refuse(q.spec, "AWQ", "it has no activation order", "the same without it, or GPTQ")
    if q.shape[1] % _PER_WORD:
        raise DoesNotFit(f"{where}: {q.shape[1]} outputs do not fill AWQ's words of {_PER_WORD}.")
    return {
        "qweight": to_stream(_fields(codes_of(q)), 4, axis=1),
        "qzeros": to_stream(_fields(zeros), 4, axis=1),
        "scales": stored_scales(grouped(scale_of(q), q), scale_format, where),
    }


def _fields(columns: np.ndarray) -> np.ndarray:
    """Columns in the order of the fields of the words."""
    words = columns.reshape(len(columns), -1, _PER_WORD)
    return words[..., _ORDER].reshape(columns.shape)


def _columns(fields: np.ndarray) -> np.ndarray:
    """The inverse of `_fields`."""
    words = fields.reshape(len(fields), -1, _PER_WORD)
    return words[..., np.argsort(_ORDER)].reshape(fields.shape)
