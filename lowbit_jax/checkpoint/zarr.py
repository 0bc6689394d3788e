"""Arrays in zarr's version 2, uncompressed: a header and files of numbers; parts of them are read.

Of the format only what `write` and orbax write for us is read; anything else is refused by name.
Nothing is allocated before all files are known to have the length that the header gives them, so
that no more memory is asked for than there are bytes on disk.
"""

import dataclasses
import itertools
import json
import math
import os
from typing import Any, Final

import numpy as np
from etils import epath

type Box = tuple[tuple[int, int], ...]

_HEADER: Final = ".zarray"
_MOST_BYTES: Final = 2**16
_ALIGNMENT: Final = 64  # bytes; XLA's CPU backend takes such memory over without a copy


@dataclasses.dataclass(frozen=True)
class File:
    """A file of numbers, open already or not.

    path: Its own.
    handle: Of the system; None opens it when it is read.
    """

    path: epath.Path
    handle: int | None = None

    @property
    def name(self) -> str:
        """Without the folder."""
        return self.path.name


@dataclasses.dataclass(frozen=True)
class Part:
    """A box of an array, found on disk and not yet read.

    Always: the header is that of the array, and each file has the length of a chunk.
    """

    dtype: np.dtype
    chunk: tuple[int, ...]
    box: Box
    files: tuple[tuple[File, tuple[int, ...]], ...]  # each with its first element's place

    def read(self) -> np.ndarray:
        """The elements, in memory that XLA takes over without a copy.

        Raises:
            ValueError: A file is shorter than it was.
            OSError: It cannot be read.
        """
        host = _aligned(tuple(b - a for a, b in self.box), self.dtype)
        for file, starts in self.files:
            _read_chunk(file, starts, self.chunk, host, self.box)
        return host

    @property
    def opened(self) -> int:
        """How many files `find` opened."""
        return sum(file.handle is not None for file, _ in self.files)

    def close(self) -> None:
        """Gives back what `find` opened."""
        for file, _ in self.files:
            if file.handle is not None:
                os.close(file.handle)


def find(
    folder: epath.Path, shape: tuple[int, ...], dtype: Any, box: Box, *, most_open: int = 0
) -> Part:
    """The part of an array that lies in a box; nothing is allocated for it yet.

    Args:
        folder: The array's.
        shape: Of the whole array; it and `dtype` have to be those on disk.
        dtype: Of its elements.
        box: First element and end along each axis.
        most_open: How many files may be opened here, in which case they have to be closed. It is
            for files of a local disk.

    Raises:
        ValueError: The array is another, a file has another length, or the header is none.
        OSError: A file is missing or cannot be read.
    """
    dtype = np.dtype(dtype)
    chunk = _chunk_shape(folder / _HEADER, shape, dtype)
    grid = [range(a // n, -(-b // n)) for (a, b), n in zip(box, chunk, strict=True)]
    size = math.prod(chunk) * dtype.itemsize
    hold = is_local(folder) and math.prod(map(len, grid)) <= most_open
    files = list[tuple[File, tuple[int, ...]]]()
    try:
        # One at a time: a header may claim more files than there is memory for their names.
        for at in itertools.product(*grid):
            path = folder / (".".join(map(str, at)) or "0")
            file = File(path, os.open(path, os.O_RDONLY) if hold else None)
            files.append((file, tuple(i * n for i, n in zip(at, chunk, strict=True))))
            found = path.stat().length if file.handle is None else os.fstat(file.handle).st_size
            if found != size:
                raise ValueError(f"{file.name} has {found} bytes instead of {size}")
    except BaseException:
        Part(dtype, chunk, box, tuple(files)).close()
        raise
    return Part(dtype, chunk, box, tuple(files))


def read(folder: epath.Path, shape: tuple[int, ...], dtype: Any, box: Box) -> np.ndarray:
    """The elements of an array that lie in a box. Arguments and errors: as `find`, `Part.read`."""
    return find(folder, shape, dtype, box).read()


def write(folder: epath.Path, array: np.ndarray, most_bytes: int) -> None:
    """Writes an array to a new folder of the local disk, on which it is when this returns.

    Args:
        folder: The array's.
        array: Of any shape and dtype that jax has.
        most_bytes: In a file, but for an element larger than that.

    Raises: OSError: The disk is full, or the folder is there.
    """
    chunk = _cut(array.shape, array.dtype.itemsize, most_bytes)
    folder.mkdir()
    header = {
        "chunks": list(chunk),
        "compressor": None,
        "dimension_separator": ".",
        "dtype": _name(array.dtype),
        "fill_value": None,
        "filters": None,
        "order": "C",
        "shape": list(array.shape),
        "zarr_format": 2,
    }
    _put(folder / _HEADER, json.dumps(header).encode())
    for at in itertools.product(*map(range, _grid(array.shape, chunk))):
        place: Any = tuple(slice(i * n, (i + 1) * n) for i, n in zip(at, chunk, strict=True))
        part = array[(*place, ...)]
        if part.shape != chunk:  # at the end a file has the length of all others
            whole = np.zeros(chunk, array.dtype)
            whole[tuple(slice(n) for n in part.shape)] = part
            part = whole
        part = np.ascontiguousarray(part).reshape(-1)
        _put(folder / (".".join(map(str, at)) or "0"), memoryview(part.view(np.uint8)))


def _cut(shape: tuple[int, ...], itemsize: int, most_bytes: int) -> tuple[int, ...]:
    """The shape of a file's part: whole trailing axes, and as even a share of the one before."""
    chunk = [1] * len(shape)
    room = max(1, most_bytes // itemsize)  # elements
    for axis in reversed(range(len(shape))):
        length = max(1, shape[axis])
        files = -(-length // min(length, room))
        chunk[axis] = -(-length // files)
        if files > 1:
            break
        room //= length
    return tuple(chunk)


def _grid(shape: tuple[int, ...], chunk: tuple[int, ...]) -> list[int]:
    return [-(-length // n) for length, n in zip(shape, chunk, strict=True)]


def _put(file: epath.Path, content: bytes | memoryview) -> None:
    handle = os.open(file, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o666)
    try:
        view = memoryview(content)
        while len(view):
            view = view[os.write(handle, view) :]
        os.fsync(handle)
    finally:
        os.close(handle)


def is_local(path: epath.Path) -> bool:
    """Whether `path` lies on a file system, and not behind a scheme such as gs://."""
    return "://" not in os.fspath(path)


def _read_chunk(
    file: File, starts: tuple[int, ...], chunk: tuple[int, ...], host: np.ndarray, box: Box
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


def _fill(file: File, array: np.ndarray) -> None:
    view = memoryview(array.reshape(-1).view(np.uint8))
    if file.handle is not None:
        # The fewest calls: each gives the interpreter's lock away and waits for it again.
        done = os.preadv(file.handle, [view], 0) if len(view) else 0
        while done < len(view):
            done += _some(os.preadv(file.handle, [view[done:]], done), file, done, len(view))
        return
    done = 0
    with file.path.open("rb") as opened:
        while done < len(view):
            done += _some(opened.readinto(view[done:]), file, done, len(view))


def _some(count: int, file: File, done: int, size: int) -> int:
    if not count:
        raise ValueError(f"{file.name} ends after {done} bytes instead of {size}")
    return count


def _chunk_shape(file: epath.Path, shape: tuple[int, ...], dtype: np.dtype) -> tuple[int, ...]:
    """The shape of a file's part, once the header has been found to be that of this array."""
    try:
        header = json.loads(_text(file))
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


def _text(file: epath.Path) -> bytes:
    """A header's bytes. Raises ValueError for more of them than a header has."""
    if is_local(file):
        # A third of the calls, of which a model needs hundreds.
        handle = os.open(file, os.O_RDONLY)
        try:
            raw = os.read(handle, _MOST_BYTES + 1)
        finally:
            os.close(handle)
    else:
        raw = file.read_bytes() if file.stat().length <= _MOST_BYTES else bytes(_MOST_BYTES + 1)
    if len(raw) > _MOST_BYTES:
        raise ValueError(f"it has more than {_MOST_BYTES} bytes")
    return raw


def _name(dtype: np.dtype) -> str:
    """A dtype as tensorstore writes it: numpy's own in numpy's words, the others by name."""
    return dtype.name if dtype.kind == "V" else dtype.str.replace("=", "<")


def _aligned(shape: tuple[int, ...], dtype: np.dtype) -> np.ndarray:
    """An uninitialized array that begins where XLA likes it to."""
    size = math.prod(shape) * dtype.itemsize
    memory = np.empty(size + _ALIGNMENT, np.uint8)
    first = -memory.ctypes.data % _ALIGNMENT
    return memory[first : first + size].view(dtype).reshape(shape)
