"""Reads safetensors files: one, or the shards that an index names.

    header length u64 | header: JSON {"name": {"dtype", "shape", "data_offsets"}, ...} | data

Offsets are [begin, end) in bytes behind the header. Every one is held against the file's size
before anything is read; a tensor is read when it is asked for, decoded to float32 or as it lies.
"""

import dataclasses
import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final, NoReturn

import ml_dtypes
import numpy as np
from jaxtyping import Float32

_INDEX: Final = "model.safetensors.index.json"
_SINGLE: Final = "model.safetensors"
# What numpy calls a type; those that it does not have stay the bytes of one element.
DTYPES: Final[dict[str, np.dtype]] = {
    "F64": np.dtype("<f8"),
    "F32": np.dtype("<f4"),
    "F16": np.dtype("<f2"),
    "BF16": np.dtype(ml_dtypes.bfloat16),
    "F8_E4M3": np.dtype(ml_dtypes.float8_e4m3fn),
    "F8_E5M2": np.dtype(ml_dtypes.float8_e5m2),
    "F8_E8M0": np.dtype(ml_dtypes.float8_e8m0fnu),
    "BOOL": np.dtype("u1"),
    "U8": np.dtype("u1"),
    "I8": np.dtype("i1"),
    "U16": np.dtype("<u2"),
    "I16": np.dtype("<i2"),
    "U32": np.dtype("<u4"),
    "I32": np.dtype("<i4"),
    "U64": np.dtype("<u8"),
    "I64": np.dtype("<i8"),
}
_FLOATS: Final = ("F32", "F16", "BF16", "F64")
_MAX_RANK: Final = 8


@dataclasses.dataclass(frozen=True)
class SafeTensor:
    """Where a tensor lies: `size` bytes of `file` from `start` on."""

    file: Path
    dtype: str
    shape: tuple[int, ...]
    start: int
    size: int


class SafeTensors:
    """The tensors of a model's folder, by name; see `interop.weights.TensorSource`."""

    def __init__(self, folder: Path):
        """Reads all headers.

        Raises:
            ValueError: No safetensors in the folder, or a damaged file or index.
            NotImplementedError: The weights are in another format.
        """
        self.where = str(folder)
        if (folder / _SINGLE).is_file():
            self.tensors = read_header(folder / _SINGLE)
        elif (folder / _INDEX).is_file():
            self.tensors = _read_shards(folder, folder / _INDEX)
        else:
            others = sorted(p.name for p in folder.glob("*.bin"))
            if others:
                raise NotImplementedError(
                    f"{folder}: the weights are in {others[0]}, a pickle. Save the model with "
                    "safe_serialization=True, as safetensors."
                )
            raise ValueError(f"{folder}: has neither {_SINGLE} nor {_INDEX}.")
        self.shapes = {name: tensor.shape for name, tensor in self.tensors.items()}

    def read(self, name: str) -> Float32[np.ndarray, "..."]:
        """A tensor as float32.

        Raises:
            KeyError: No tensor `name`.
            NotImplementedError: Its type is none of the floats.
        """
        tensor = self.tensors[name]
        if tensor.dtype not in _FLOATS:
            raise NotImplementedError(
                f"{tensor.file}: tensor {name!r} is {tensor.dtype}; read are {list(_FLOATS)}."
            )
        return self.raw(name).astype(np.float32, copy=False)

    def raw(self, name: str) -> np.ndarray:
        """A tensor in its own type. Raises: KeyError: No tensor `name`."""
        tensor = self.tensors[name]
        dtype = DTYPES[tensor.dtype]
        count = tensor.size // dtype.itemsize
        return np.fromfile(tensor.file, dtype, count, offset=tensor.start).reshape(tensor.shape)


def read_header(path: Path) -> dict[str, SafeTensor]:
    """The tensors of one file. Raises: ValueError: Its header does not fit the file."""
    size = path.stat().st_size
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        if size < 8 or not 2 <= length <= size - 8:
            _fail(path, f"its header would take {length} bytes of {size}")
        header = _parse(path, file.read(length))
    header.pop("__metadata__", None)
    tensors = {name: _tensor(path, name, entry, 8 + length) for name, entry in header.items()}
    # As the format asks: the data without gaps or overlaps, up to the end of the file.
    expected = 8 + length
    for name, tensor in sorted(tensors.items(), key=lambda item: (item[1].start, item[1].size)):
        if tensor.start != expected:
            _fail(path, f"tensor {name!r} lies at byte {tensor.start} instead of {expected}")
        expected += tensor.size
    if expected != size:
        _fail(path, f"its tensors end at byte {expected} of {size}")
    return tensors


def _tensor(path: Path, name: str, entry: Any, begin: int) -> SafeTensor:
    match entry:
        case {"dtype": str(dtype), "shape": list(shape), "data_offsets": [int(first), int(last)]}:
            pass
        case _:
            _fail(path, f"the entry of tensor {name!r} is not dtype, shape and two offsets")
    if dtype not in DTYPES:
        _fail(path, f"tensor {name!r} has the unknown type {dtype!r}")
    if len(shape) > _MAX_RANK or not all(type(length) is int and length >= 0 for length in shape):
        _fail(path, f"tensor {name!r} has a shape that is not up to {_MAX_RANK} integers >= 0")
    width = DTYPES[dtype].itemsize
    if not 0 <= first <= last or last - first != math.prod(shape) * width:
        _fail(path, f"tensor {name!r}: {dtype} {shape} does not take bytes [{first}, {last})")
    return SafeTensor(path, dtype, tuple(shape), begin + first, last - first)


def _read_shards(folder: Path, index: Path) -> dict[str, SafeTensor]:
    content = _parse(index, index.read_bytes())
    names = content.get("weight_map")
    if not isinstance(names, Mapping) or not all(isinstance(v, str) for v in names.values()):
        _fail(index, "it has no weight_map from tensors to files")
    tensors: dict[str, SafeTensor] = {}
    for shard in sorted(set(names.values())):
        # A shard is a file of this folder: no name leads out of it.
        if Path(shard).name != shard or not shard.endswith(".safetensors") or "\0" in shard:
            _fail(index, f"{shard!r} is not the name of a safetensors file in the folder")
        if not (folder / shard).is_file():
            raise ValueError(f"{index}: the shard {shard} is missing. Fetch the folder again.")
        found = read_header(folder / shard)
        if twice := sorted(set(found) & set(tensors)):
            _fail(index, f"tensor {twice[0]!r} is in two shards, {shard} and another")
        tensors |= found
    for name, shard in names.items():
        if name not in tensors or tensors[name].file.name != shard:
            _fail(index, f"tensor {name!r} is not in {shard}, where it should be")
    return tensors


def _parse(path: Path, raw: bytes) -> dict[str, Any]:
    try:
        content = json.loads(raw)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path}: no JSON where there should be some ({error}).") from None
    if not isinstance(content, dict):
        _fail(path, "its JSON is not an object")
    return content


def _fail(path: Path, reason: str) -> NoReturn:
    raise ValueError(f"{path}: truncated or damaged: {reason}. Fetch it again.")
