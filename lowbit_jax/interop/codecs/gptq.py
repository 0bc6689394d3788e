"""GPTQ's layout, versions 1 and 2.

    qweight  int32 [K * bits / 32, N]    codes along K, dense, lowest bits first
    qzeros   int32 [G, N * bits / 32]    zero points along N; version 1 stores each minus 1
    scales   [G, N]
    g_idx    int32 [K]                   the group of each row
    W[k, n] = (code[k, n] - zero[g_idx[k], n]) * scale[g_idx[k], n]

With activation order `g_idx` is not sorted; our rows are, and `input_permutation` remembers where
they were. The label of the version is wrong in some files. Where all zeros of a symmetric file are
the same number, that number tells: the middle of the range is version 2, one less is version 1.
"""

import warnings
from collections.abc import Mapping
from typing import Final

import numpy as np

from lowbit_jax.interop.codecs.bitstreams import from_stream, stream_length, to_stream
from lowbit_jax.interop.codecs.integers import (
    grouped,
    permutation_of,
    spec_of_zeros,
    words_as_they_are,
    zeros_of,
)
from lowbit_jax.interop.codecs.parts import (
    DoesNotFit,
    Kernel,
    check_finite,
    codes_of,
    group_size,
    grouping,
    make_qtensor,
    middle,
    refuse,
    require,
    scale_format_of,
    scale_of,
    stored_scales,
    take,
)
from lowbit_jax.scale_formats import FLOAT16, ScaleFormat

BITS: Final = (2, 3, 4, 8)
PARTS: Final = ("qweight", "qzeros", "scales", "g_idx")
_NEAREST: Final = "w4a16_g128 or w4a16_g128_asym, with 2, 3, 4 or 8 bits"


def decode(
    tensors: Mapping[str, np.ndarray], *, bits: int, version: int, symmetric: bool, where: str
) -> Kernel:
    """The kernel in a layer's tensors.

    Args:
        tensors: `PARTS`; without `g_idx` the groups lie in order.
        bits: 2, 3, 4 or 8.
        version: 1 or 2, as the file's label says; zeros that contradict it win, with a warning.
        symmetric: Whether the configuration says so.
        where: The layer, for messages.
    Raises:
        ValueError: The tensors do not belong together.
        NotImplementedError: Another width, or groups of several lengths.
    """
    check_bits(bits, where)
    qweight, scale = take(tensors, "qweight", where, 2), take(tensors, "scales", where, 2)
    qzeros = take(tensors, "qzeros", where, 2)
    (groups, n), words = scale.shape, qweight.shape[0]
    k = words * 32 // bits
    if not words or not groups or words * 32 % bits:
        raise ValueError(f"{where}: qweight {qweight.shape} holds no whole codes of {bits} bits.")
    require(qweight, "qweight", where, dtype=np.int32, shape=(words, n))
    require(qzeros, "qzeros", where, dtype=np.int32, shape=(groups, stream_length(n, bits)))
    check_finite(scale, f"{where}: the scales")
    stored = from_stream(qzeros, bits, n, axis=1)
    if symmetric:
        version = _version_of(stored, bits, version, where)
    zeros = (stored + (version == 1)) & np.uint8(2**bits - 1)
    granularity = grouping(k, groups, where)
    found = spec_of_zeros(zeros, bits, granularity, scale_format_of(scale, where))
    permutation = permutation_of(tensors.get("g_idx"), k, groups, where)
    if permutation is None and (q := words_as_they_are(qweight, found, scale, k)) is not None:
        return Kernel(q)
    codes = from_stream(qweight, bits, k, axis=0)
    if permutation is not None:
        codes = codes[permutation]
    q = make_qtensor(codes, found.spec, scale, zero_point=found.zero_point, where=where)
    return Kernel(q, permutation)


def encode(
    kernel: Kernel, *, version: int, where: str, scale_format: ScaleFormat = FLOAT16
) -> dict[str, np.ndarray]:
    """A layer's tensors: the inverse of `decode`.

    Args:
        kernel: 2, 3, 4 or 8 bits, consecutive integers.
        version: 1 or 2. In version 1 a zero point of 0 wraps to the largest code.
        where: The layer, for messages.
        scale_format: What the scales become.
    Raises:
        NotImplementedError: The format has no such scheme.
        DoesNotFit: Codes or zero points do not end with a word.
        ValueError: A scale that the format of scales does not have.
    """
    q = kernel.qtensor
    bits, (k, n) = q.spec.bits, q.shape
    if bits not in BITS:
        refuse(q.spec, "GPTQ", f"codes have {list(BITS)} bits", _NEAREST)
    zeros = grouped(zeros_of(q, "GPTQ", _NEAREST), q)
    if k * bits % 32 or n * bits % 32:
        raise DoesNotFit(
            f"{where}: {k} x {n} codes of {bits} bits do not end with a word of 32 bits in both "
            "directions, which GPTQ needs."
        )
    codes, groups = codes_of(q), np.arange(k, dtype=np.int32) // group_size(q)
    if kernel.input_permutation is not None:
        back = np.argsort(kernel.input_permutation)
        codes, groups = codes[back], groups[back]
    stored = (zeros - (version == 1)) & np.uint8(2**bits - 1)
    return {
        "qweight": to_stream(codes, bits, axis=0),
        "qzeros": to_stream(stored, bits, axis=1),
        "scales": stored_scales(grouped(scale_of(q), q), scale_format, where),
        "g_idx": groups,
    }


def check_bits(bits: int, where: str) -> None:
    """Raises NotImplementedError for a width that GPTQ's dense layout is not known to have."""
    if bits not in BITS:
        raise NotImplementedError(f"{where}: GPTQ with {bits} bits; known are {list(BITS)}.")


def _version_of(stored: np.ndarray, bits: int, label: int, where: str) -> int:
    """The version that a symmetric file's zeros tell, all of which are one number."""
    told = {middle(bits): 2, middle(bits) - 1: 1}
    first = int(stored.flat[0])
    if first not in told or not (stored == first).all():
        raise ValueError(
            f"{where}: the configuration says that zero points are the middle of the range, "
            f"{middle(bits)} (stored as that or one less), and they are {np.unique(stored)}. "
            "The file is damaged, or not symmetric."
        )
    if told[first] != label:
        warnings.warn(
            f"{where}: the file is labelled as GPTQ version {label}, and its stored zeros, all "
            f"{first}, are those of version {told[first]}: read as that.",
            stacklevel=3,
        )
    return told[first]
