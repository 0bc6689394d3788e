"""Reads GGUF files, versions 2 and 3, little-endian.

    "GGUF" | version u32 | tensors u64 | pairs u64 | pairs: key, type u32, value
    tensors: name, dimensions u32, length of each u64 (fastest first), type u32, offset u64
    padding to `general.alignment` (32 without one) | data of each tensor, padded

A string is its length in bytes, u64, and its UTF-8; an array its type u32, its length u64 and its
elements. Every number in a file is a claim: nothing is read, and nothing is allocated, before it
was held against the bytes that are there. Data is checked as ggml does: in order, without gaps but
padding. That way a wrong type or length shows, and tensors cannot overlap.
"""

import dataclasses
import math
import struct
from pathlib import Path
from typing import Any, Final, NoReturn

import numpy as np
from jaxtyping import Float32, UInt8

from lowbit_jax.interop.ggml_types import TYPES, GGMLType

MAGIC: Final = b"GGUF"
_VERSIONS = (2, 3)
_ALIGNMENT = 32
_MAX_DIMENSIONS = 4  # ggml's
_MAX_DEPTH = 4  # of arrays in arrays; no known file has more than one
_SCALARS: dict[int, str] = {
    0: "u1",
    1: "i1",
    2: "u2",
    3: "i2",
    4: "u4",
    5: "i4",
    6: "f4",
    7: "?",
    10: "u8",
    11: "i8",
    12: "f8",
}
_STRING, _ARRAY, _BOOL = 8, 9, 7
_LEAST_PAIR = 8 + 1 + 4 + 1  # bytes: key of one character, type, value
_LEAST_TENSOR = 8 + 1 + 4 + 8 + 4 + 8


@dataclasses.dataclass(frozen=True)
class GGUFTensor:
    """Where a tensor lies, and what it is.

    shape: Slowest axis first, as in numpy: a linear layer is (out, in).
    start, size: Its bytes in the file.
    """

    name: str
    shape: tuple[int, ...]
    type: GGMLType
    start: int
    size: int


class GGUFFile:
    """A GGUF file, mapped and checked; tensors are decoded when they are read.

    metadata: Numbers, bools, strings; arrays as numpy arrays, lists of strings, or lists of those.
    tensors: By name, in the order of the file.
    """

    def __init__(self, path: str | Path):
        """Reads all but the tensors' data.

        Raises:
            ValueError: It is no GGUF file, or its header does not fit the file.
            FileNotFoundError: No file at `path`.
        """
        self.path = Path(path)
        size = self.path.stat().st_size
        # An empty file cannot be mapped.
        self._data = np.memmap(self.path, np.uint8, "r") if size else np.empty(0, np.uint8)
        reader = _Reader(self.path, self._data)
        self.version, self.metadata, self.tensors = reader.header()

    def read(self, name: str) -> Float32[np.ndarray, "..."]:
        """A tensor, decoded to a new float32 array.

        Raises:
            KeyError: No tensor `name`.
            NotImplementedError: Its type is not decoded here.
        """
        tensor = self.tensors[name]
        if tensor.type.decode is None:
            known = [kind.name for kind in TYPES.values() if kind.decode is not None]
            raise NotImplementedError(
                f"{self.path}: tensor {name!r} is stored as {tensor.type.name}, which is not "
                f"decoded here. Decoded: {known}. Convert the file to one of them."
            )
        return tensor.type.decode(self.raw(name)).reshape(tensor.shape)

    def raw(self, name: str) -> UInt8[np.ndarray, " size"]:
        """A tensor's bytes. Raises: KeyError: No tensor `name`."""
        tensor = self.tensors[name]
        return np.asarray(self._data[tensor.start : tensor.start + tensor.size])


class _Reader:
    """Reads the header from front to end; `at` is the place of the next byte."""

    def __init__(self, path: Path, data: np.ndarray):
        self.path, self.view, self.at = path, memoryview(data), 0

    def header(self) -> tuple[int, dict[str, Any], dict[str, GGUFTensor]]:
        if bytes(self.view[:4]) != MAGIC:
            raise ValueError(
                f"{self.path}: not a GGUF file: it begins with {bytes(self.view[:4])!r} instead of "
                f"{MAGIC!r}."
            )
        self.at = 4
        version = self.number("u4", "the version")
        if version not in _VERSIONS:
            if version.to_bytes(4, "big") in {v.to_bytes(4, "little") for v in _VERSIONS}:
                self.fail("the file is big-endian; only little-endian ones are read")
            self.fail(f"version {version} is not one of {list(_VERSIONS)}")
        tensors = self.count("tensors", _LEAST_TENSOR)
        pairs = self.count("metadata pairs", _LEAST_PAIR)
        if tensors * _LEAST_TENSOR + pairs * _LEAST_PAIR > len(self.view) - self.at:
            self.fail(f"{tensors} tensors and {pairs} metadata pairs do not fit the file")

        metadata: dict[str, Any] = {}
        for i in range(pairs):
            key = self.string(f"key {i}")
            if not key or key in metadata:
                self.fail(f"key {i}, {key!r}, is {'a second of its name' if key else 'empty'}")
            metadata[key] = self.value(self.number("u4", f"the type of {key!r}"), repr(key))
        found: dict[str, tuple[tuple[int, ...], GGMLType, int]] = {}
        for i in range(tensors):
            name = self.string(f"the name of tensor {i}")
            if not name or name in found:
                self.fail(
                    f"tensor {i}, {name!r}, is {'a second of its name' if name else 'unnamed'}"
                )
            found[name] = self.tensor_info(name)
        return version, metadata, self.placed(found, self.alignment(metadata))

    def tensor_info(self, name: str) -> tuple[tuple[int, ...], GGMLType, int]:
        dimensions = self.number("u4", f"the dimensions of {name!r}")
        if not 1 <= dimensions <= _MAX_DIMENSIONS:
            self.fail(f"tensor {name!r} has {dimensions} dimensions; 1 to {_MAX_DIMENSIONS} exist")
        shape = tuple(self.number("u8", f"a length of {name!r}") for _ in range(dimensions))[::-1]
        number = self.number("u4", f"the type of {name!r}")
        offset = self.number("u8", f"the offset of {name!r}")
        if number not in TYPES:
            self.fail(f"tensor {name!r} has the type {number}, which ggml does not have")
        kind = TYPES[number]
        if 0 in shape or shape[-1] % kind.block:
            self.fail(
                f"tensor {name!r} of shape {shape} cannot be {kind.name}, whose rows are made of "
                f"blocks of {kind.block}"
            )
        return shape, kind, offset

    def alignment(self, metadata: dict[str, Any]) -> int:
        value = metadata.get("general.alignment", _ALIGNMENT)
        if type(value) is not int or value < 1 or value & (value - 1):
            self.fail(f"general.alignment is {value!r}, and not a power of two")
        return value

    def placed(
        self, found: dict[str, tuple[tuple[int, ...], GGMLType, int]], alignment: int
    ) -> dict[str, GGUFTensor]:
        begin, expected = -(-self.at // alignment) * alignment, 0
        tensors = {}
        for name, (shape, kind, offset) in found.items():
            if offset != expected:
                self.fail(
                    f"tensor {name!r} lies at offset {offset}, where {expected} follows from those "
                    f"before it: types, shapes or offsets are wrong"
                )
            size = math.prod(shape) // kind.block * kind.size
            if begin + offset + size > len(self.view):
                self.fail(
                    f"tensor {name!r} ({kind.name} {shape}, {size} bytes at {begin + offset}) "
                    "reaches beyond the end of the file"
                )
            tensors[name] = GGUFTensor(name, shape, kind, begin + offset, size)
            expected += -(-size // alignment) * alignment
        return tensors

    def value(self, kind: int, what: str, depth: int = 0) -> Any:
        if kind == _STRING:
            return self.string(what)
        if kind == _ARRAY:
            if depth == _MAX_DEPTH:
                self.fail(f"{what} is an array in more than {_MAX_DEPTH} arrays")
            return self.array(what, depth)
        if kind not in _SCALARS:
            self.fail(f"{what} has the type {kind}, which GGUF does not have")
        if kind == _BOOL:
            byte = self.number("u1", what)
            if byte > 1:
                self.fail(f"{what} is a bool of value {byte}")
            return bool(byte)
        return self.number(_SCALARS[kind], what)

    def array(self, what: str, depth: int) -> Any:
        kind = self.number("u4", f"the element type of {what}")
        if kind in (_STRING, _ARRAY):
            least = 8 if kind == _STRING else 12
            length = self.count(f"elements of {what}", least)
            return [self.value(kind, f"{what}[{i}]", depth + 1) for i in range(length)]
        if kind not in _SCALARS:
            self.fail(f"{what} has elements of type {kind}, which GGUF does not have")
        dtype = np.dtype(_SCALARS[kind]).newbyteorder("<")
        length = self.count(f"elements of {what}", dtype.itemsize)
        raw = self.take(length * dtype.itemsize, what)
        if kind == _BOOL and max(raw, default=0) > 1:
            self.fail(f"{what} has a bool that is neither 0 nor 1")
        return np.frombuffer(raw, dtype).astype(dtype.newbyteorder("="))

    def string(self, what: str) -> str:
        raw = self.take(self.count(f"bytes of {what}", 1), what)
        try:
            return raw.decode()
        except UnicodeDecodeError as error:
            self.fail(f"{what} is not UTF-8 ({error.reason})")

    def count(self, what: str, least: int) -> int:
        """A number of things that take at least `least` bytes each."""
        count = self.number("u8", f"the number of {what}")
        if count * least > len(self.view) - self.at:
            self.fail(
                f"{count} {what} would take at least {count * least} bytes, and "
                f"{len(self.view) - self.at} are left: the file is truncated or damaged"
            )
        return count

    def number(self, dtype: str, what: str) -> Any:
        code = {"u1": "B", "i1": "b", "u2": "H", "i2": "h", "u4": "I", "i4": "i"} | {
            "u8": "Q",
            "i8": "q",
            "f4": "f",
            "f8": "d",
        }
        size = int(dtype[1])
        return struct.unpack("<" + code[dtype], self.take(size, what))[0]

    def take(self, size: int, what: str) -> bytes:
        if size > len(self.view) - self.at:
            self.fail(f"the file ends inside {what}")
        self.at += size
        return bytes(self.view[self.at - size : self.at])

    def fail(self, reason: str) -> NoReturn:
        raise ValueError(
            f"{self.path}: not a sound GGUF file, at byte {self.at} of {len(self.view)}: {reason}. "
            "Fetch it again, or convert the model again."
        )
