"""Codes <-> 32-bit words as files keep them: dense, or with padding at the end of each word.

Dense: code i takes the bits `[i * bits, (i + 1) * bits)` of the stream of words, lowest first, and
may straddle two words (3 bits: 32 codes in 3 words). Padded: each word holds `32 // bits` codes;
its last bits are 0. For 1, 2, 4 and 8 bits both are the same, and the order of `packing`.

One strided slice at a time, so that nothing larger than the codes is ever made.
"""

import numpy as np
from jaxtyping import Int32, UInt8

WORD = 32


def stream_length(n: int, bits: int, *, padded: bool = False) -> int:
    """Words that `n` codes take."""
    return -(-n // (WORD // bits)) if padded else -(-n * bits // WORD)


def to_stream(
    codes: UInt8[np.ndarray, "..."], bits: int, axis: int, *, padded: bool = False
) -> Int32[np.ndarray, "..."]:
    """Codes in `[0, 2**bits)` to words, along `axis`; what is left of the last word is 0."""
    codes = np.moveaxis(codes, axis, -1)
    n = codes.shape[-1]
    words = np.zeros((*codes.shape[:-1], stream_length(n, bits, padded=padded)), np.uint32)
    for i, (word, shift, cycle, period) in enumerate(_places(bits, padded)):
        part = codes[..., i::cycle].astype(np.uint32)
        words[..., word::period][..., : part.shape[-1]] |= part << np.uint32(shift)
        if shift + bits > WORD:
            words[..., word + 1 :: period][..., : part.shape[-1]] |= part >> np.uint32(WORD - shift)
    return np.ascontiguousarray(np.moveaxis(words.view(np.int32), -1, axis))


def from_stream(
    words: Int32[np.ndarray, "..."], bits: int, n: int, axis: int, *, padded: bool = False
) -> UInt8[np.ndarray, "..."]:
    """The inverse of `to_stream`: the first `n` codes along `axis`."""
    words = np.moveaxis(words, axis, -1).view(np.uint32)
    codes = np.empty((*words.shape[:-1], n), np.uint8)
    mask = np.uint32(2**bits - 1)
    for i, (word, shift, cycle, period) in enumerate(_places(bits, padded)):
        target = codes[..., i::cycle]
        count = target.shape[-1]
        part = words[..., word::period][..., :count] >> np.uint32(shift)
        if shift + bits > WORD:
            part |= words[..., word + 1 :: period][..., :count] << np.uint32(WORD - shift)
        target[...] = part & mask
    return np.moveaxis(codes, -1, axis)


def _places(bits: int, padded: bool) -> list[tuple[int, int, int, int]]:
    """For the i-th code of a cycle: its word, its lowest bit, codes and words of a cycle."""
    if padded or WORD % bits == 0:
        per_word = WORD // bits
        return [(0, i * bits, per_word, 1) for i in range(per_word)]
    return [(i * bits // WORD, i * bits % WORD, WORD, bits) for i in range(WORD)]
