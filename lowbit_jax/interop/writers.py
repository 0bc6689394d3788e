"""Bytes of safetensors and GGUF files, written one tensor at a time.

A GGUF header needs types and shapes alone. That of a safetensors file needs what each layer is
encoded to, so its tensors go to a file beside it first.
"""

import dataclasses
import json
import math
import shutil
import struct
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, BinaryIO, Final

import numpy as np

from lowbit_jax.interop.ggml_types import TYPES
from lowbit_jax.interop.gguf import MAGIC
from lowbit_jax.interop.safetensors_files import DTYPES

_NAMES: Final = {dtype: name for name, dtype in DTYPES.items() if name != "BOOL"}
_TYPES: Final = {kind.name: (number, kind) for number, kind in TYPES.items()}
_ALIGNMENT: Final = 32
_SCALARS: Final[dict[Any, tuple[int, str]]] = {
    np.dtype(np.int32): (5, "<i4"),
    np.dtype(np.float32): (6, "<f4"),
}


def write_safetensors(path: Path, tensors: Iterable[tuple[str, np.ndarray]]) -> None:
    """Writes tensors as they come; nothing but one of them is in memory."""
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    beside, at = path.with_name(f".{path.name}.data"), 0
    try:
        with beside.open("wb") as file:
            for name, tensor in tensors:
                data = np.ascontiguousarray(tensor)
                header[name] = {
                    "dtype": _NAMES[data.dtype],
                    "shape": list(tensor.shape),
                    "data_offsets": [at, at + data.nbytes],
                }
                file.write(data.reshape(-1).view(np.uint8).data)
                at += data.nbytes
        text = json.dumps(header, separators=(",", ":")).encode()
        text += b" " * (-len(text) % 8)  # so that the data is aligned
        with path.open("wb") as file, beside.open("rb") as data_file:
            file.write(struct.pack("<Q", len(text)) + text)
            shutil.copyfileobj(data_file, file)
    finally:
        beside.unlink(missing_ok=True)


@dataclasses.dataclass(frozen=True)
class GGUFOutput:
    """A tensor to write: its name, ggml's name of its type, shape (slowest first) and bytes."""

    name: str
    type: str
    shape: tuple[int, ...]
    data: Callable[[], np.ndarray]

    @property
    def size(self) -> int:
        """Bytes of the data."""
        kind = _TYPES[self.type][1]
        return math.prod(self.shape) // kind.block * kind.size


def write_gguf(path: Path, metadata: Mapping[str, Any], tensors: Sequence[GGUFOutput]) -> None:
    """Writes a GGUF file of version 3, little-endian.

    Args:
        path: Of the file.
        metadata: Strings, bools, ints in [0, 2**32), floats; lists of strings, and int32 or float32
            arrays.
        tensors: In their order in the file.
    """
    with path.open("wb") as file:
        file.write(MAGIC + struct.pack("<IQQ", 3, len(tensors), len(metadata)))
        for key, value in metadata.items():
            file.write(_string(key) + _value(value))
        offset = 0
        for tensor in tensors:
            file.write(_string(tensor.name) + struct.pack("<I", len(tensor.shape)))
            file.write(struct.pack(f"<{len(tensor.shape)}Q", *tensor.shape[::-1]))
            file.write(struct.pack("<IQ", _TYPES[tensor.type][0], offset))
            offset += -(-tensor.size // _ALIGNMENT) * _ALIGNMENT
        _pad(file)
        for tensor in tensors:
            data = np.ascontiguousarray(tensor.data()).reshape(-1).view(np.uint8)
            assert data.size == tensor.size, tensor.name
            file.write(data.data)
            _pad(file)


def _pad(file: BinaryIO) -> None:
    file.write(b"\0" * (-file.tell() % _ALIGNMENT))


def _string(text: str) -> bytes:
    raw = text.encode()
    return struct.pack("<Q", len(raw)) + raw


def _value(value: Any) -> bytes:
    match value:
        case bool():
            return struct.pack("<IB", 7, value)
        case int():
            return struct.pack("<II", 4, value)
        case float():
            return struct.pack("<If", 6, value)
        case str():
            return struct.pack("<I", 8) + _string(value)
        case list():
            strings = b"".join(map(_string, value))
            return struct.pack("<IIQ", 9, 8, len(value)) + strings
        case np.ndarray():
            number, dtype = _SCALARS[value.dtype]
            return struct.pack("<IIQ", 9, number, len(value)) + value.astype(dtype).tobytes()
    raise TypeError(f"a GGUF file has no value of type {type(value).__name__}.")
