"""Codes <-> words: several codes in one int32, in planes of 8, 4, 2 and 1 bits.

A plane of width w packs `32 // w` consecutive codes along K into each word, lowest bits first: for
2, 4 and 8 bits this is the order of GPTQ checkpoints, and what a TPU's bitcast of int32 to a w-bit
integer reads. Other widths are split into planes, widest first (3 = 2 + 1, 5 = 4 + 1, 6 = 4 + 2, 7
= 4 + 2 + 1); the first plane holds the low bits. K is padded to a multiple of 32, so that every
plane ends at a word.

The functions take jax arrays or numpy arrays and return the same kind: files are packed with the
same code.
"""

import types
from typing import Any, Final

import jax.numpy as jnp
import numpy as np

WORD: Final = 32
PLANES: Final[dict[int, tuple[int, ...]]] = {
    1: (1,), 2: (2,), 3: (2, 1), 4: (4,), 5: (4, 1), 6: (4, 2), 7: (4, 2, 1), 8: (8,),
}  # fmt: skip


def padded_length(k: int) -> int:
    """K rounded up to a multiple of 32, in codes."""
    return -(-k // WORD) * WORD


def pack(codes: Any, bits: int) -> Any:
    """Packs `32 // bits` consecutive codes of a column into each word, lowest bits first.

    Word `[..., i, j]` holds code `[..., i * (32 // bits) + p, j]` in its bits `[p * bits, (p + 1) *
    bits)`.

    Args:
        codes: Unsigned codes in `[0, 2**bits)`, uint8 [..., K, N].
        bits: Width of one code, in bits: 1, 2, 4 or 8.

    Returns:
        Words, int32 [..., K * bits / 32, N].

    Raises:
        ValueError: `bits` is not 1, 2, 4 or 8, or K is not a multiple of `32 // bits`.

    Example:
        >>> hex(int(pack(np.array([[1], [2], [0], [3]] * 2, np.uint8), bits=4)[0, 0]))
        '0x30213021'
    """
    _check_width(bits)
    xp, per_word = _module(codes), WORD // bits
    *lead, k, n = codes.shape
    if k % per_word:
        raise ValueError(
            f"pack: {k} codes along K do not fill words of {per_word} codes of {bits} bits. "
            f"Pad K to {-(-k // per_word) * per_word}."
        )
    fields = codes.reshape(*lead, k // per_word, per_word, n).astype(xp.uint32)
    shifts = xp.arange(per_word, dtype=xp.uint32) * xp.uint32(bits)
    shifts = shifts.reshape((1,) * (len(lead) + 1) + (per_word, 1))
    return xp.sum(fields << shifts, axis=-2, dtype=xp.uint32).view(xp.int32)


def unpack(words: Any, bits: int) -> Any:
    """The inverse of `pack`: words, int32 [..., W, N], to codes, uint8 [..., W * 32 / bits, N].

    Raises:
        ValueError: `bits` is not 1, 2, 4 or 8.
    """
    _check_width(bits)
    xp, per_word = _module(words), WORD // bits
    *lead, w, n = words.shape
    shifts = xp.arange(per_word, dtype=xp.uint32) * xp.uint32(bits)
    shifts = shifts.reshape((1,) * (len(lead) + 1) + (per_word, 1))
    fields = words.view(xp.uint32).reshape(*lead, w, 1, n) >> shifts
    codes = (fields & xp.uint32(2**bits - 1)).astype(xp.uint8)
    return codes.reshape(*lead, w * per_word, n)


def pack_planes(codes: Any, bits: int, *, pad_code: int = 0) -> tuple[Any, ...]:
    """Packs codes of any width from 1 to 8 bits into planes, K padded to a multiple of 32.

    Args:
        codes: Unsigned codes in `[0, 2**bits)`, uint8 [..., K, N].
        bits: Width of one code, in bits, 1 to 8.
        pad_code: Code of the padded rows, which are never used.

    Returns:
        One int32 [..., ceil32(K) * width / 32, N] per plane, widest first.

    Raises:
        ValueError: `bits` is not in 1..8.
    """
    widths = _planes(bits)
    xp = _module(codes)
    k = codes.shape[-2]
    if padding := padded_length(k) - k:
        rows = [(0, 0)] * (codes.ndim - 2) + [(0, padding), (0, 0)]
        codes = xp.pad(codes, rows, constant_values=pad_code)
    words, low = [], 0
    for width in widths:
        words.append(pack((codes >> low) & xp.uint8(2**width - 1), width))
        low += width
    return tuple(words)


def unpack_planes(words: tuple[Any, ...], bits: int, k: int) -> Any:
    """The inverse of `pack_planes`: codes, uint8 [..., k, N].

    Raises:
        ValueError: The planes are not those of `bits`, or are too short for `k`.
    """
    widths = _planes(bits)
    if len(words) != len(widths):
        raise ValueError(
            f"unpack_planes: {len(words)} planes given, {bits} bits have {len(widths)}: {widths}."
        )
    codes, low = None, 0
    for plane, width in zip(words, widths, strict=True):
        if plane.shape[-2] * (WORD // width) != padded_length(k):
            raise ValueError(
                f"unpack_planes: a plane of {width} bits has {plane.shape[-2]} words along K, "
                f"{k} codes take {padded_length(k) * width // WORD}."
            )
        part = unpack(plane, width) << low
        codes = part if codes is None else codes | part
        low += width
    assert codes is not None
    return codes[..., :k, :]


def word_count(bits: int, k: int) -> int:
    """Words along K, over all planes, of `k` codes: 32-bit words a column."""
    return padded_length(k) * sum(_planes(bits)) // WORD


def _planes(bits: int) -> tuple[int, ...]:
    if bits not in PLANES:
        raise ValueError(f"codes have 1 to 8 bits, not {bits}.")
    return PLANES[bits]


def _check_width(bits: int) -> None:
    if bits not in (1, 2, 4, 8):
        raise ValueError(f"a plane has 1, 2, 4 or 8 bits, not {bits}; see pack_planes.")


def _module(array: Any) -> types.ModuleType:
    return np if isinstance(array, np.ndarray) else jnp
