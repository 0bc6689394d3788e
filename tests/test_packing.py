import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lowbit_jax import packing

pytestmark = pytest.mark.usefixtures("strict_dtypes")


def _codes(bits, shape):
    return np.random.default_rng(bits).integers(0, 2**bits, shape).astype(np.uint8)


@pytest.mark.parametrize("bits", range(1, 9))
@pytest.mark.parametrize("k", [1, 31, 32, 33, 64])
def test_planes_hold_every_code_and_numpy_is_the_twin_of_jax(bits, k):
    codes = _codes(bits, (2, k, 3))
    words = packing.pack_planes(codes, bits, pad_code=1)
    assert all(isinstance(w, np.ndarray) and w.dtype == np.int32 for w in words)
    assert sum(w.shape[-2] for w in words) == packing.word_count(bits, k)
    unpacked = packing.unpack_planes(words, bits, k)
    assert isinstance(unpacked, np.ndarray)
    np.testing.assert_array_equal(unpacked, codes)
    by_jax = packing.pack_planes(jnp.asarray(codes), bits, pad_code=1)
    for ours, theirs in zip(words, by_jax, strict=True):
        assert isinstance(theirs, jax.Array)
        np.testing.assert_array_equal(ours, theirs)
    np.testing.assert_array_equal(packing.unpack_planes(by_jax, bits, k), codes)


@pytest.mark.parametrize("bits", range(1, 9))
def test_a_multiple_of_32_codes_takes_exactly_their_bits(bits):
    words = packing.pack_planes(_codes(bits, (96, 1)), bits)
    assert sum(w.nbytes for w in words) * 8 == 96 * bits


def test_padding_is_the_code_that_was_asked_for():
    (plane,) = packing.pack_planes(np.zeros((5, 1), np.uint8), 4, pad_code=8)
    np.testing.assert_array_equal(packing.unpack(plane, 4)[:, 0], [0] * 5 + [8] * 27)


@pytest.mark.parametrize("bits", [1, 2, 4, 8])
def test_planes_are_cut_anywhere_along_n_and_at_words_along_k(bits):
    codes = _codes(bits, (128, 6))
    words = packing.pack(codes, bits)
    np.testing.assert_array_equal(packing.pack(codes[:, 2:4], bits), words[:, 2:4])
    np.testing.assert_array_equal(packing.pack(codes[64:], bits), words[len(words) // 2 :])


def test_arrays_that_are_not_contiguous_pack_alike():
    codes = _codes(4, (8, 64)).T
    np.testing.assert_array_equal(packing.pack(codes, 4), packing.pack(codes.copy(), 4))
    words = np.asfortranarray(packing.pack(codes, 4))
    np.testing.assert_array_equal(packing.unpack(words, 4), codes)


def test_errors_name_the_numbers():
    with pytest.raises(ValueError, match="1, 2, 4 or 8 bits, not 3"):
        packing.pack(_codes(3, (32, 1)), 3)
    with pytest.raises(ValueError, match="1, 2, 4 or 8 bits, not 3"):
        packing.unpack(np.zeros((1, 1), np.int32), 3)
    with pytest.raises(ValueError, match=r"12 codes .* 8 codes of 4 bits. Pad K to 16"):
        packing.pack(_codes(4, (12, 1)), 4)
    with pytest.raises(ValueError, match="1 to 8 bits, not 9"):
        packing.pack_planes(_codes(8, (32, 1)), 9)
    words = packing.pack_planes(_codes(3, (32, 1)), 3)
    with pytest.raises(ValueError, match="1 planes given, 3 bits have 2"):
        packing.unpack_planes(words[:1], 3, 32)
    with pytest.raises(ValueError, match=r"has 2 words along K, 33 codes take 4"):
        packing.unpack_planes(words, 3, 33)
