"""Words of files, one bit at a time."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lowbit_jax import packing
from lowbit_jax.interop.codecs.bitstreams import from_stream, stream_length, to_stream


def bits_of(codes: list[int], bits: int, padded: bool) -> list[int]:
    """The words of one row, as one large integer that is cut."""
    per_word = 32 // bits
    if padded:
        rows = [codes[i : i + per_word] for i in range(0, len(codes), per_word)]
        return [sum(c << (bits * i) for i, c in enumerate(row)) for row in rows]
    stream = sum(c << (bits * i) for i, c in enumerate(codes))
    return [(stream >> (32 * i)) & 0xFFFFFFFF for i in range(-(-len(codes) * bits // 32))]


@settings(max_examples=60)
@given(
    bits=st.integers(1, 8),
    n=st.integers(1, 100),
    axis=st.integers(0, 1),
    padded=st.booleans(),
    seed=st.integers(0, 2**32 - 1),
)
def test_streams_are_the_integer_cut_in_words(bits, n, axis, padded, seed):
    rows = np.random.default_rng(seed).integers(0, 2**bits, (3, n), dtype=np.uint8)
    codes = rows if axis == 1 else rows.T
    words = to_stream(codes, bits, axis, padded=padded)
    wanted = np.array([bits_of(row.tolist(), bits, padded) for row in rows], np.uint32)
    got = words.view(np.uint32)
    np.testing.assert_array_equal(got if axis == 1 else got.T, wanted)
    assert words.shape[axis] == stream_length(n, bits, padded=padded)
    np.testing.assert_array_equal(from_stream(words, bits, n, axis, padded=padded), codes)


@pytest.mark.parametrize("bits", [1, 2, 4, 8])
def test_widths_that_divide_a_word_are_packed_as_ours(bits):
    codes = np.random.default_rng(0).integers(0, 2**bits, (64, 5), dtype=np.uint8)
    np.testing.assert_array_equal(to_stream(codes, bits, axis=0), packing.pack(codes, bits))
