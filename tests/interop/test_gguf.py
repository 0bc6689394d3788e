"""A GGUF file is read as it was written, and never beyond what is there."""

import contextlib
import struct
import tracemalloc

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from lowbit_jax.interop.gguf import GGUFFile

METADATA = {
    "general.architecture": "test",
    "text": "é, and ▁",
    "flag": True,
    "float": np.float32(0.1),
    "double": np.float64(0.1),
    **{f"int{i}": kind(7) for i, kind in enumerate([np.uint8, np.uint16, np.uint32, np.uint64])},
    **{f"neg{i}": kind(-7) for i, kind in enumerate([np.int8, np.int16, np.int32, np.int64])},
    "words": ["a", "", "ß"],
    "numbers": np.arange(5, dtype=np.int16),
    "flags": [True, False],
    "nested": [["a"], ["b", "c"]],
}
MATRIX = np.arange(6, dtype=np.float32).reshape(2, 3)
HALVES = np.arange(3, dtype=np.float16)
BLOCKS = b"\x00\x3c" + bytes(range(32))  # d = 1, codes 0 to 31
TENSORS = {
    "matrix": ("F32", (2, 3), MATRIX.tobytes()),
    "halves": ("F16", (3,), HALVES.tobytes()),
    "blocks": ("Q8_0", (1, 32), BLOCKS),
}


@pytest.fixture(scope="module")
def content(files) -> bytes:
    return files.gguf(METADATA, TENSORS)


def check(file: GGUFFile) -> None:
    for key, value in METADATA.items():
        got = file.metadata[key]
        assert (list(got) == list(value)) if np.iterable(value) else (got == value), key
    assert list(file.metadata) == list(METADATA)
    assert list(file.tensors) == list(TENSORS)
    np.testing.assert_array_equal(file.read("matrix"), MATRIX)
    np.testing.assert_array_equal(file.read("halves"), HALVES.astype(np.float32))
    np.testing.assert_array_equal(file.read("blocks"), np.arange(32, dtype=np.float32)[None])


@pytest.mark.parametrize("version", [2, 3])
@pytest.mark.parametrize("alignment", [None, 1, 128])
def test_what_was_written_is_read(files, save, version, alignment):
    metadata = METADATA if alignment is None else {**METADATA, "general.alignment": alignment}
    content = files.gguf(metadata, TENSORS, version=version, alignment=alignment or 32)
    file = GGUFFile(save(content))
    assert file.version == version
    assert file.metadata.pop("general.alignment", None) == alignment
    check(file)


def test_types_of_metadata_are_plain(content, save):
    metadata = GGUFFile(save(content)).metadata
    assert type(metadata["int0"]) is int
    assert type(metadata["float"]) is float
    assert type(metadata["flag"]) is bool
    assert type(metadata["text"]) is str
    assert metadata["numbers"].dtype == np.int16


@given(data=st.data())
def test_a_truncated_file_is_an_error(content, tmp_path_factory, data):
    length = data.draw(st.integers(0, len(content) - 1))
    path = tmp_path_factory.getbasetemp() / "truncated.gguf"
    path.write_bytes(content[:length])
    # The last bytes only pad the last tensor.
    padding = -len(BLOCKS) % 32
    if length >= len(content) - padding:
        check(GGUFFile(path))
    else:
        with pytest.raises(ValueError, match=r"truncated\.gguf"):
            GGUFFile(path)


@given(data=st.data())
def test_a_changed_byte_is_an_error_or_a_file(content, tmp_path_factory, data):
    """Whatever a header says, it is refused, or everything that it says can be read."""
    changed = bytearray(content)
    for _ in range(data.draw(st.integers(1, 3))):
        changed[data.draw(st.integers(0, len(content) - 1))] = data.draw(st.integers(0, 255))
    path = tmp_path_factory.getbasetemp() / "changed.gguf"
    path.write_bytes(changed)
    with contextlib.suppress(ValueError):
        file = GGUFFile(path)
        for name, tensor in file.tensors.items():
            with contextlib.suppress(NotImplementedError):
                assert file.read(name).shape == tensor.shape


def header(tensors=0, pairs=0, rest=b"", version=3) -> bytes:
    return b"GGUF" + struct.pack("<IQQ", version, tensors, pairs) + rest


def pair(files, kind: int, content: bytes, key: str = "key") -> bytes:
    return files.gguf_string(key) + struct.pack("<I", kind) + content


HUGE = struct.pack("<Q", 2**62)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda f: b"", r"begins with b''"),
        (lambda f: b"GGML" + bytes(20), r"begins with b'GGML' instead of b'GGUF'"),
        (lambda f: header(version=1), r"version 1 is not one of \[2, 3\]"),
        (lambda f: header(version=3 << 24), r"big-endian"),
        (lambda f: header(tensors=2**62), r"tensors would take at least .* 8 are left"),
        (lambda f: header(pairs=2**62), r"metadata pairs would take at least"),
        (lambda f: header(pairs=1, rest=HUGE + bytes(20)), r"bytes of key 0 would take at least"),
        (lambda f: header(pairs=1, rest=pair(f, 8, HUGE)), r"bytes of 'key' would take"),
        (
            lambda f: header(pairs=1, rest=pair(f, 9, struct.pack("<I", 8) + HUGE)),
            r"elements of 'key' would take at least",
        ),
        (
            lambda f: header(pairs=1, rest=pair(f, 9, struct.pack("<I", 12) + HUGE)),
            r"elements of 'key' would take at least",
        ),
        (
            lambda f: header(pairs=1, rest=pair(f, 9, struct.pack("<IQ", 9, 1) * 9 + bytes(12))),
            r"an array in more than 4 arrays",
        ),
        (lambda f: header(pairs=1, rest=pair(f, 13, bytes(8))), r"has the type 13"),
        (lambda f: header(pairs=1, rest=pair(f, 7, b"\x02")), r"a bool of value 2"),
        (
            lambda f: header(pairs=1, rest=pair(f, 8, struct.pack("<Q", 1) + b"\xff")),
            r"'key' is not UTF-8",
        ),
        (
            lambda f: header(pairs=2, rest=pair(f, 0, b"\x01") * 2),
            r"key 1, 'key', is a second of its name",
        ),
        (lambda f: f.gguf({"general.alignment": 3}, {}), r"alignment is 3, and not a power of two"),
        (lambda f: f.gguf({"general.alignment": 0}, {}), r"alignment is 0"),
        (lambda f: f.gguf({}, {"t": ("Q8_0", (33,), bytes(64))}), r"blocks of 32"),
        (lambda f: f.gguf({}, {"t": ("F32", (0, 4), b"")}), r"shape \(0, 4\)"),
        (lambda f: f.gguf({}, {"t": ("F32", (1,) * 5, bytes(4))}), r"has 5 dimensions"),
        (lambda f: f.gguf({}, {"t": ("F32", (2**40, 2**40), b"")}), r"beyond the end of the file"),
        (
            lambda f: f.gguf({}, {"t": ("F32", (8,), b""), "u": ("F32", (8,), bytes(32))}),
            r"'u' lies at offset 0, where 32 follows",
        ),
        (
            lambda f: f.gguf({}, {"t": ("F32", (8,), bytes(32))})[:-1],
            r"beyond the end of the file",
        ),
    ],
)
def test_a_lie_is_named(files, save, make, message):
    with pytest.raises(ValueError, match=message):
        GGUFFile(save(make(files)))


def test_lies_about_sizes_allocate_nothing(files, save):
    lies = [
        header(tensors=2**58),
        header(pairs=1, rest=pair(files, 9, struct.pack("<IQ", 0, 2**40))),
        files.gguf({}, {"t": ("F32", (2**20, 2**20), bytes(4))}),
    ]
    for lie in lies:
        path = save(lie)
        tracemalloc.start()
        with pytest.raises(ValueError, match="sound GGUF"):
            GGUFFile(path)
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        # Messages and the reader itself; each lie is of a tebibyte and more.
        assert peak < 2**20


def test_a_type_that_is_not_decoded_is_named_when_it_is_read(files, save):
    file = GGUFFile(save(files.gguf({}, {"t": ("Q4_K", (256,), bytes(144))})))
    assert file.tensors["t"].size == 144
    with pytest.raises(NotImplementedError, match=r"'t' is stored as Q4_K.*'Q8_0'"):
        file.read("t")


def test_a_missing_file_is_said_to_be_missing(tmp_path):
    with pytest.raises(FileNotFoundError, match="nothing"):
        GGUFFile(tmp_path / "nothing")
