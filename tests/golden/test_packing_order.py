"""Words with a source: the nibble order of GPTQ checkpoints, and our planes of odd widths."""

import jax.numpy as jnp
import numpy as np
import pytest

from lowbit_jax import packing

pytestmark = pytest.mark.usefixtures("strict_dtypes")


def _column(codes):
    return np.array(codes, np.uint8)[:, None]


def _hex(words):
    return [f"{int(w) & 0xFFFFFFFF:08x}" for w in np.asarray(words).ravel()]


@pytest.mark.parametrize("xp", [np, jnp])
@pytest.mark.parametrize(
    ("bits", "codes", "words"),
    [
        (4, [1, 2, 0, 3] * 2, ["30213021"]),
        (4, [0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15], ["76543210", "fedcba98"]),
        (2, [0, 1, 2, 3] * 4, ["e4e4e4e4"]),
        (8, [1, 2, 3, 255], ["ff030201"]),
        (1, [1] + [0] * 30 + [1], ["80000001"]),  # bit 31 is the sign of the int32
    ],
)
def test_words_are_in_gptq_order(xp, bits, codes, words):
    assert _hex(packing.pack(xp.asarray(_column(codes)), bits)) == words


def test_the_loop_of_a_gptq_checkpoint_gives_the_same_words():
    # AutoGPTQ's definition: qweight[row] |= intweight[j] << (bits * (j - i)), for the j of a word.
    codes = np.random.default_rng(0).integers(0, 16, (64, 3)).astype(np.uint8)
    qweight = np.zeros((8, 3), np.uint32)
    for row in range(8):
        for j in range(8):
            qweight[row] |= codes[row * 8 + j].astype(np.uint32) << np.uint32(4 * j)
    np.testing.assert_array_equal(packing.pack(codes, 4), qweight.view(np.int32))


@pytest.mark.parametrize(
    ("bits", "planes"),
    [
        # 32 codes, all 0b...: the low plane comes first.
        (3, [["55555555"] * 2, ["ffffffff"]]),  # 0b101 = 1 + (01): low 2 bits 01, high bit 1
        (5, [["55555555"] * 4, ["ffffffff"]]),  # 0b10101: low 4 bits 0101, high bit 1
        (6, [["55555555"] * 4, ["aaaaaaaa"] * 2]),  # 0b100101: low 4 bits 0101, high 2 bits 10
        (7, [["55555555"] * 4, ["aaaaaaaa"] * 2, ["ffffffff"]]),  # 0b1100101
    ],
)
def test_planes_of_odd_widths(bits, planes):
    code = {3: 0b101, 5: 0b10101, 6: 0b100101, 7: 0b1100101}[bits]
    words = packing.pack_planes(_column([code] * 32), bits)
    assert [_hex(plane) for plane in words] == planes
