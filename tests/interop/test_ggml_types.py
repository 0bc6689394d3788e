"""Blocks decode as ggml's documentation says, one element at a time."""

import struct

import ml_dtypes
import numpy as np
import pytest

from lowbit_jax.interop.ggml_types import TYPES

BY_NAME = {kind.name: kind for kind in TYPES.values()}


def decode(name: str, data: bytes) -> np.ndarray:
    return BY_NAME[name].decode(np.frombuffer(data, np.uint8))


def half(data: bytes) -> np.float32:
    return np.float32(struct.unpack("<e", data)[0])


def q8_0(data: bytes) -> list[np.float32]:
    values = []
    for at in range(0, len(data), 34):
        scale = half(data[at : at + 2])
        values += [np.float32(q) * scale for q in struct.unpack("<32b", data[at + 2 : at + 34])]
    return values


def q4_0(data: bytes) -> list[np.float32]:
    values = []
    for at in range(0, len(data), 18):
        scale, codes = half(data[at : at + 2]), data[at + 2 : at + 18]
        values += [np.float32((byte & 15) - 8) * scale for byte in codes]
        values += [np.float32((byte >> 4) - 8) * scale for byte in codes]
    return values


@pytest.mark.parametrize("scalar", [q8_0, q4_0], ids=lambda f: f.__name__)
def test_blocks_decode_to_the_same_bits_as_element_by_element(scalar):
    kind, rng = BY_NAME[scalar.__name__.upper()], np.random.default_rng(0)
    # Every byte may stand for a code; scales cover subnormal, zero, negative and large ones.
    scales = [0.0, -1.5, 6e-8, 65504.0, 1 / 3]
    data = b"".join(struct.pack("<e", s) + rng.bytes(kind.size - 2) for s in scales)
    got = decode(kind.name, data)
    assert got.dtype == np.float32
    assert got.shape == (kind.block * len(scales),)
    np.testing.assert_array_equal(got, np.array(scalar(data)))


@pytest.mark.parametrize(
    ("name", "dtype"), [("F32", np.float32), ("F16", np.float16), ("BF16", ml_dtypes.bfloat16)]
)
def test_floats_widen_exactly(name, dtype):
    values = np.array([0, -0.0, 1, -1 / 3, 1e-7, 60000, np.inf], dtype)
    got = decode(name, values.tobytes())
    np.testing.assert_array_equal(got, values.astype(np.float32))
    assert np.signbit(got[1])


def test_what_is_decoded_is_new_memory():
    data = np.zeros(8, np.uint8)
    data.flags.writeable = False
    assert BY_NAME["F32"].decode(data).flags.writeable
