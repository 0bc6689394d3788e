"""Reads a part of an array in zarr's version 2, uncompressed: a header and files of numbers.

Of the format only what orbax writes for us is read; anything else is refused by name. Nothing is
allocated before all files are known to have the length that the header gives them, so that no more
memory is asked for than there are bytes on disk.
"""

import itertools
import json
import math
from typing import Any, Final

import numpy as np
from etils import epath

type Box = tuple[tuple[int, int], ...]

_HEADER: Final = ".zarray"
_MOST_BYTES: Final = 2**16
_ALIGNMENT: Final = 64  # bytes; XLA's CPU backend takes such memory over without a copy


def read(folder: epath.Path, shape: tuple[int, ...], dtype: Any, box: Box) -> np.ndarray:
    """The elements of an array that lie in a box.

    Args:
        folder: The array's.
        shape: Of the whole array; it and `dtype` have to be those on disk.
        dtype: Of its elements.
        box: First element and end along each axis.

    Raises:
        ValueError: The array is another, a file has another length, or the header is none.
        OSError: A file is missing or cannot be read.
    """
    dtype = np.dtype(dtype)
    chunk = _chunk_shape(folder / _HEADER, shape, dtype)
    grid = [range(a // n, -(-b // n)) for (a, b), n in zip(box, chunk, strict=True)]
    files = {at: folder / (".".join(map(str, at)) or "0") for at in itertools.product(*grid)}
    size = math.prod(chunk) * dtype.itemsize
    for file in files.values():
        if (found := file.stat().length) != size:
            raise ValueError(f"{file.name} has {found} bytes instead of {size}")
    host = _aligned(tuple(b - a for a, b in box), dtype)
    for at, file in files.items():
        starts = [i * n for i, n in zip(at, chunk, strict=True)]
        _read_chunk(file, starts, chunk, host, box)
    return host


def _read_chunk(
    file: epath.Path, starts: list[int], chunk: tuple[int, ...], host: np.ndarray, box: Box
) -> None:
    """Puts what a chunk and the box share into its place."""
    shared = [
        (max(start, a), min(start + n, b))
        for start, n, (a, b) in zip(starts, chunk, box, strict=True)
    ]
    into: Any = tuple(slice(lo - a, hi - a) for (lo, hi), (a, _) in zip(shared, box, strict=True))
    target = host[(*into, ...)]  # with an ellipsis an array of rank 0 stays an array
    if target.shape == chunk and target.flags.c_contiguous:
        _fill(file, target)
        return
    whole = np.empty(chunk, host.dtype)
    _fill(file, whole)
    target[...] = whole[
        tuple(slice(lo - start, hi - start) for (lo, hi), start in zip(shared, starts, strict=True))
    ]


def _fill(file: epath.Path, array: np.ndarray) -> None:
    view = memoryview(array.reshape(-1).view(np.uint8))
    done = 0
    with file.open("rb") as opened:
        while done < len(view):
            count = opened.readinto(view[done:])
            if not count:
                raise ValueError(f"{file.name} ends after {done} bytes instead of {len(view)}")
            done += count


def _chunk_shape(file: epath.Path, shape: tuple[int, ...], dtype: np.dtype) -> tuple[int, ...]:
    """The shape of a file's part, once the header has been found to be that of this array."""
    if file.stat().length > _MOST_BYTES:
        raise ValueError(f"{file.name} has more than {_MOST_BYTES} bytes")
    try:
        header = json.loads(file.read_text())
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{file.name} is no JSON: {error}") from None
    expected = {
        "zarr_format": 2,
        "order": "C",
        "compressor": None,
        "filters": None,
        "shape": list(shape),
        "dtype": _name(dtype),
    }
    for key, value in expected.items():
        found = header.get(key) if isinstance(header, dict) else None
        if found != value:
            raise ValueError(f"{key} is {repr(found)[:80]} on disk and {value!r} in the manifest")
    if header.get("dimension_separator", ".") != ".":
        raise ValueError(f"dimension_separator {header['dimension_separator']!r} is not '.'")
    chunk = header.get("chunks")
    if not (
        isinstance(chunk, list)
        and len(chunk) == len(shape)
        and all(type(n) is int for n in chunk)
        and all(0 < n <= max(1, length) for n, length in zip(chunk, shape, strict=True))
    ):
        raise ValueError(f"chunks {repr(chunk)[:80]} do not fit the shape {list(shape)}")
    return tuple(chunk)


def _name(dtype: np.dtype) -> str:
    """A dtype as tensorstore writes it: numpy's own in numpy's words, the others by name."""
    return dtype.name if dtype.kind == "V" else dtype.str.replace("=", "<")


def _aligned(shape: tuple[int, ...], dtype: np.dtype) -> np.ndarray:
    """An uninitialized array that begins where XLA likes it to."""
    size = math.prod(shape) * dtype.itemsize
    memory = np.empty(size + _ALIGNMENT, np.uint8)
    first = -memory.ctypes.data % _ALIGNMENT
    return memory[first : first + size].view(dtype).reshape(shape)
