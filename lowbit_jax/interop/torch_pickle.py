"""Reads the tensors of a file that `torch.save` wrote; what it pickled is not executed.

Two layouts: since torch 1.6 an uncompressed zip (`*/data.pkl`, and `*/data/KEY` for each storage);
before, five pickles one after the other (a magic number, the protocol, the machine's sizes, the
object, the storages' keys), then for each storage its length, u64, and its elements.
"""

import io
import math
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any, Final

import numpy as np

from lowbit_jax.interop.pickle_machine import Machine, Storage, View

LEGACY: Final = b"\x80\x02\x8a\nl\xfc\x9cF\xf9 j\xa8P\x19."
ZIP: Final = b"PK\x03\x04"
_PROTOCOL: Final = 1001


def read_tensors(path: str | Path) -> dict[str, np.ndarray]:
    """The tensors of a state dict, by name, in the types they were saved in.

    The state dict is what was saved, or stands in it under "state_dict". Arrays are read-only and
    may share memory, as the tensors did.

    Raises:
        ValueError: No file of torch, damaged, or one that holds anything but numbers, strings,
            dicts, lists and tensors.
        NotImplementedError: A tensor that is not contiguous, or of a type that is not read here.
    """
    path = Path(path)
    data = path.read_bytes()
    try:
        content, storages = _read_zip(data) if data.startswith(ZIP) else _read_legacy(data)
        tensors = _state_dict(content)
        return {name: _array(view, storages) for name, view in tensors.items()}
    except NotImplementedError as error:
        raise NotImplementedError(f"{path}: {error}") from None
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None


def _state_dict(content: Any) -> dict[str, View]:
    if isinstance(content, dict) and isinstance(content.get("state_dict"), dict):
        content = content["state_dict"]
    if not isinstance(content, dict) or not content:
        raise ValueError("holds no state dict, a dict from names to tensors.")
    for name, value in content.items():
        if not isinstance(name, str) or not isinstance(value, View):
            raise ValueError(f"entry {name!r} of the state dict is not a named tensor.")
    return content


def _read_zip(data: bytes) -> tuple[Any, Callable[[Storage], bytes]]:
    try:
        archive = zipfile.ZipFile(io.BytesIO(data))
        entries = {entry.filename: entry for entry in archive.infolist()}
    except Exception as error:  # zipfile answers damage with many kinds of exceptions
        raise ValueError(f"damaged zip ({error}).") from None

    def read(name: str) -> bytes:
        entry = entries.get(name)
        # torch does not compress, so nothing here can be larger than the file.
        if entry is None or entry.compress_type != zipfile.ZIP_STORED:
            raise ValueError(f"its entry {name} is missing or compressed.")
        try:
            return archive.read(entry)
        except Exception as error:
            raise ValueError(f"its entry {name} is damaged ({error}).") from None

    pickles = [name for name in entries if name.split("/")[1:] == ["data.pkl"]]
    if len(pickles) != 1:
        raise ValueError(f"a zip with {len(pickles)} entries */data.pkl, and torch writes one.")
    folder = pickles[0].removesuffix("data.pkl")
    if f"{folder}byteorder" in entries and read(f"{folder}byteorder") != b"little":
        raise NotImplementedError("written by a big-endian machine.")
    content = Machine(io.BytesIO(read(pickles[0]))).run()
    return content, lambda storage: read(f"{folder}data/{storage.key}")


def _read_legacy(data: bytes) -> tuple[Any, Callable[[Storage], bytes]]:
    stream = io.BytesIO(data)
    if not data.startswith(LEGACY):
        raise ValueError("not a file that torch.save wrote.")
    stream.seek(len(LEGACY))
    protocol, sizes = Machine(stream).run(), Machine(stream).run()
    if protocol != _PROTOCOL:
        raise ValueError(f"its protocol is not {_PROTOCOL}.")
    if not isinstance(sizes, dict) or sizes.get("little_endian") is not True:
        raise NotImplementedError("written by a big-endian machine.")
    machine = Machine(stream)
    content, keys = machine.run(), Machine(stream).run()
    names = [key for key in keys if isinstance(key, str)] if isinstance(keys, list) else []
    if set(names) != set(machine.storages):
        raise ValueError("its storages are not those that its tensors use.")
    places: dict[str, slice] = {}
    for key in names:
        storage, begin = machine.storages[key], stream.tell() + 8
        length = int.from_bytes(stream.read(8), "little")
        end = begin + length * storage.dtype.itemsize
        if length != storage.length or end > len(data):
            raise ValueError(f"truncated or damaged: storage {key} has {length} elements.")
        places[key] = slice(begin, end)
        stream.seek(end)
    return content, lambda storage: data[places[storage.key]]


def _array(view: View, read: Callable[[Storage], bytes]) -> np.ndarray:
    data, dtype, count = read(view.storage), view.storage.dtype, math.prod(view.shape)
    if len(data) != view.storage.length * dtype.itemsize:
        raise ValueError(f"truncated or damaged: storage {view.storage.key} has another size.")
    return np.frombuffer(data, dtype, count, view.offset * dtype.itemsize).reshape(view.shape)
