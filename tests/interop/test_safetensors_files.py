"""Safetensors are read as they were written, and never beyond what is there."""

import contextlib
import json
import struct

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from lowbit_jax.interop.safetensors_files import SafeTensors, read_header

TENSORS = {
    "a": np.arange(6, dtype=np.float32).reshape(2, 3),
    "b": np.array([1, -1 / 3, 1e-7], np.float16),
    "c": np.array([[1, -1 / 3, 3e38]], ml_dtypes.bfloat16),
}
INDEX = "model.safetensors.index.json"


@pytest.fixture(scope="module")
def content(files) -> bytes:
    return files.safetensors(TENSORS)


def check(tensors: SafeTensors) -> None:
    assert tensors.shapes == {name: value.shape for name, value in TENSORS.items()}
    for name, value in TENSORS.items():
        got = tensors.read(name)
        assert got.dtype == np.float32
        np.testing.assert_array_equal(got, value.astype(np.float32))


@pytest.fixture
def sharded(files, tmp_path):
    """Writes TENSORS as two shards with an index, and returns the index's map."""
    names = {"a": "one.safetensors", "b": "two.safetensors", "c": "one.safetensors"}

    def write(names=names, **extra) -> None:
        for shard in {"one.safetensors", "two.safetensors"}:
            part = {n: TENSORS[n] for n in TENSORS if names.get(n) == shard}
            (tmp_path / shard).write_bytes(files.safetensors(part))
        (tmp_path / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": names | extra}))

    write()
    return write


def test_a_single_file_is_read(content, save, tmp_path):
    save(content, "model.safetensors")
    check(SafeTensors(tmp_path))


def test_shards_are_read(sharded, tmp_path):
    check(SafeTensors(tmp_path))


def test_the_library_reads_what_the_tests_write(content, save):
    safetensors = pytest.importorskip("safetensors")
    path = save(content, "model.safetensors")
    with safetensors.safe_open(path, "numpy") as file:
        np.testing.assert_array_equal(file.get_tensor("a"), TENSORS["a"])
        assert {name: file.get_slice(name).get_dtype() for name in file.keys()} == {  # noqa: SIM118
            "a": "F32",
            "b": "F16",
            "c": "BF16",
        }


@given(data=st.data())
def test_a_truncated_file_is_an_error(content, tmp_path_factory, data):
    path = tmp_path_factory.getbasetemp() / "model.safetensors"
    path.write_bytes(content[: data.draw(st.integers(0, len(content) - 1))])
    with pytest.raises(ValueError, match=r"model\.safetensors"):
        SafeTensors(path.parent)


@given(data=st.data())
def test_a_changed_byte_is_an_error_or_a_file(content, tmp_path_factory, data):
    changed = bytearray(content)
    for _ in range(data.draw(st.integers(1, 3))):
        changed[data.draw(st.integers(0, len(content) - 1))] = data.draw(st.integers(0, 255))
    path = tmp_path_factory.getbasetemp() / "model.safetensors"
    path.write_bytes(changed)
    with contextlib.suppress(ValueError):
        tensors = SafeTensors(path.parent)
        for name, shape in tensors.shapes.items():
            with contextlib.suppress(NotImplementedError):
                assert tensors.read(name).shape == shape


def with_header(header: object, data: bytes = b"") -> bytes:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + data


def entry(dtype="F32", shape=(1,), offsets=(0, 4)) -> dict:
    return {"dtype": dtype, "shape": list(shape), "data_offsets": list(offsets)}


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", r"header would take 0 bytes of 0"),
        (struct.pack("<Q", 2**63) + b"{}", r"header would take 9223372036854775808 bytes of 10"),
        (with_header(b"{{}"), r"no JSON"),
        (with_header(b"[" * 10**5), r"no JSON"),
        (with_header([]), r"is not an object"),
        (with_header({"a": 1}), r"tensor 'a' is not dtype, shape and two offsets"),
        (with_header({"a": entry(dtype="X9")}, bytes(4)), r"unknown type 'X9'"),
        (with_header({"a": entry(shape=(-1,))}, bytes(4)), r"up to 8 integers >= 0"),
        (with_header({"a": entry(shape=(1,) * 9)}, bytes(4)), r"up to 8 integers >= 0"),
        (
            with_header({"a": entry(shape=(2,))}, bytes(4)),
            r"F32 \[2\] does not take bytes \[0, 4\)",
        ),
        (with_header({"a": entry(shape=(2**62,), offsets=(0, 2**64))}), r"end at byte"),
        (with_header({"a": entry(offsets=(4, 8))}, bytes(8)), r"lies at byte \d+ instead of"),
        (with_header({"a": entry(), "b": entry()}, bytes(4)), r"tensor 'b' lies at byte"),
        (with_header({"a": entry()}, bytes(5)), r"end at byte \d+ of"),
    ],
)
def test_a_lie_is_named(save, content, message):
    with pytest.raises(ValueError, match=message):
        read_header(save(content, "model.safetensors"))


@pytest.mark.parametrize(
    ("names", "message"),
    [
        ({"d": "../secret.safetensors"}, r"'../secret.safetensors' is not the name of a safetens"),
        ({"d": "/etc/passwd"}, r"'/etc/passwd' is not the name"),
        ({"d": "a\0.safetensors"}, r"is not the name"),
        ({"d": ".."}, r"'..' is not the name"),
        ({"d": "three.safetensors"}, r"the shard three.safetensors is missing"),
        ({"d": "one.safetensors"}, r"tensor 'd' is not in one.safetensors"),
        ({"d": 1}, r"no weight_map"),
    ],
)
def test_an_index_that_lies_is_named(sharded, tmp_path, names, message):
    sharded(**names)
    with pytest.raises(ValueError, match=message):
        SafeTensors(tmp_path)


def test_a_tensor_in_two_shards_is_named(sharded, files, tmp_path):
    (tmp_path / "two.safetensors").write_bytes(files.safetensors(TENSORS))
    with pytest.raises(ValueError, match=r"tensor 'a' is in two shards"):
        SafeTensors(tmp_path)


def test_an_integer_tensor_is_named_when_it_is_read(save, tmp_path):
    save(with_header({"a": entry(dtype="I32")}, bytes(4)), "model.safetensors")
    tensors = SafeTensors(tmp_path)
    with pytest.raises(NotImplementedError, match=r"tensor 'a' is I32; read are"):
        tensors.read("a")


def test_a_folder_without_safetensors_says_so(tmp_path):
    with pytest.raises(ValueError, match=r"neither model.safetensors nor"):
        SafeTensors(tmp_path)
    (tmp_path / "pytorch_model.bin").write_bytes(b"")
    with pytest.raises(NotImplementedError, match=r"pytorch_model.bin, a pickle"):
        SafeTensors(tmp_path)
