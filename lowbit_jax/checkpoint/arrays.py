"""The arrays of a checkpoint on disk, and orbax as what writes them.

Each array is a folder in zarr's version 2, uncompressed: `.zarray`, a few lines of JSON, and files
of numbers in C order, little-endian. What differs from orbax's defaults was measured
(experiments/benchmarks/checkpoint.py):

- no compression: packed words are close to random bits, and zstd costs half of the throughput;
- a folder per array instead of one database of all (OCDBT), which writes more slowly;
- chunks of at most `CHUNK` bytes: a process that needs a part of an array reads little more;
- where one process holds all of a model and the disk is local, the files of an array are written
  by zarr.py, from inside orbax's save: orbax's own writer takes 3 ms of Python an array: a save of
  240 arrays, 260 MB, took 1.62 s with it and takes 1.27;
- the files are read by zarr.py straight into the memory that the arrays keep. Orbax's reader holds
  each array three times on its way, keeps a fifth more memory than they take, and the process dies
  with a header that claims too much. It still reads schema 1.
"""

import collections
import concurrent.futures
import contextlib
import hashlib
import logging
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Final, override

import jax
import numpy as np
import orbax.checkpoint as ocp
from etils import epath

from lowbit_jax.checkpoint import zarr

CHUNK: Final = 2**24  # bytes
_THREADS: Final = 4
_WRITERS: Final = 48  # threads, nearly all of which wait for the disk to have a file
_MOST_OPEN: Final = 256  # files at once; a process has 1,024 by default


class Writer:
    """Writes in the background once `start` has returned, until `finish` has."""

    def __init__(self):
        registry = ocp.type_handlers.create_type_handler_registry(
            (jax.Array, _Arrays()), (np.ndarray, ocp.type_handlers.NumpyHandler())
        )
        handler = ocp.PyTreeCheckpointHandler(
            use_ocdbt=False, use_compression=False, type_handler_registry=registry
        )
        self._orbax = ocp.AsyncCheckpointer(handler)
        self._quiet = _NoDatabase()
        logging.getLogger("absl").addFilter(self._quiet)

    def start(self, folder: epath.Path, tree: dict[str, Any]) -> None:
        """Copies the arrays to the host where they are not, and begins to write them."""
        chunks = jax.tree.map(lambda _: ocp.SaveArgs(chunk_byte_size=CHUNK), tree)
        self._orbax.save(folder.resolve(), args=ocp.args.PyTreeSave(tree, save_args=chunks))

    def finish(self) -> None:
        """Waits until all is on disk under its name; raises what went wrong."""
        try:
            self._orbax.wait_until_finished()
        finally:
            self.close()

    def close(self) -> None:
        """Gives threads back."""
        self._orbax.close()
        logging.getLogger("absl").removeFilter(self._quiet)


class _Arrays(ocp.type_handlers.ArrayHandler):
    """Orbax's handler, which leaves to zarr.py what it can write."""

    def __init__(self):
        # What these two would add, shardings and chunks by process, we do not read.
        super().__init__(enable_write_sharding_file=False, array_metadata_store=None)

    @override
    async def serialize(
        self, values: Sequence[jax.Array], infos: Sequence[Any], args: Any = None
    ) -> Sequence[ocp.future.Future]:
        if jax.process_count() > 1 or not zarr.is_local(infos[0].parent_dir):
            return await super().serialize(values, infos, args)
        for value in values:
            value.copy_to_host_async()
        hosts = [np.asarray(value) for value in values]

        async def write() -> None:
            for info in infos:
                await info.await_path_creation()
            # Large ones first, so that none is left alone at the end.
            order = sorted(range(len(hosts)), key=lambda i: -hosts[i].nbytes)
            with concurrent.futures.ThreadPoolExecutor(_WRITERS) as pool:
                futures = [
                    pool.submit(zarr.write, infos[i].parent_dir / infos[i].name, hosts[i], CHUNK)
                    for i in order
                ]
                for future in futures:
                    future.result()

        return [ocp.future.CommitFutureAwaitingContractedSignals(write(), name="arrays")]


class _NoDatabase(logging.Filter):
    """Drops orbax's warning at every save that there is no OCDBT database, which we asked for."""

    def filter(self, record: logging.LogRecord) -> bool:
        return "Skipping merge of OCDBT" not in record.getMessage()


@contextlib.contextmanager
def reading(
    folder: epath.Path, target: dict[str, Any], *, hashed: bool = False
) -> Iterator[Callable[[], tuple[dict[str, Any], dict[str, Any]]]]:
    """Begins to read arrays as `target` has them: a tree of ShapeDtypeStruct with shardings.

    A process reads the part that its devices need, and that once. Other work of this thread goes on
    beside it; each call that reads waits some 5 ms for the interpreter's lock then, which is why
    files are found and opened before, and the largest are read first.

    Args:
        folder: Of the arrays.
        target: What is read, and where it goes.
        hashed: Whether the SHA-256 of the arrays' bytes is wanted.

    Yields: What waits for the arrays and returns them, and a tree of their digests: None for an
        array of which this process reads a part, and without `hashed`.

    Raises: (the yielded function)
        ValueError: An array is missing, truncated or of another shape or type; with its path.
    """
    leaves, structure = jax.tree_util.tree_flatten_with_path(target)
    places = [
        (folder / jax.tree_util.keystr(path, simple=True, separator="."), leaf)
        for path, leaf in leaves
    ]
    order = sorted(range(len(places)), key=lambda i: -places[i][1].size)
    parts = dict[int, zarr.Part]()

    opened = 0

    def find(i: int) -> None:
        nonlocal opened
        where, leaf = places[i]
        box, _ = _needed(leaf)
        left = _MOST_OPEN - opened
        with _named(where):
            parts[i] = zarr.find(where, leaf.shape, leaf.dtype, box, most_open=left)
        opened += parts[i].opened

    def read(i: int) -> tuple[np.ndarray, str | None]:
        where, leaf = places[i]
        with _named(where):
            host = parts[i].read()
        whole = hashed and host.shape == leaf.shape
        return host, hashlib.sha256(memoryview(_flat_bytes(host))).hexdigest() if whole else None

    pool = concurrent.futures.ThreadPoolExecutor(_THREADS)
    try:
        futures = dict[int, concurrent.futures.Future[tuple[np.ndarray, str | None]]]()
        wrong: ValueError | None = None
        try:
            # Behind a network each waits for an answer.
            each = map if zarr.is_local(folder) else pool.map
            collections.deque(each(find, order), maxlen=0)
            futures = {i: pool.submit(read, i) for i in order}
        except ValueError as error:
            wrong = error  # what the model itself says is wrong comes first

        def finish() -> tuple[dict[str, Any], dict[str, Any]]:
            if wrong is not None:
                raise wrong
            hosts, digests = zip(*[futures[i].result() for i in range(len(places))], strict=True)
            arrays = [_on_devices(leaf, x) for (_, leaf), x in zip(places, hosts, strict=True)]
            return jax.tree.unflatten(structure, arrays), jax.tree.unflatten(structure, digests)

        yield finish
    finally:
        pool.shutdown(cancel_futures=True)  # after an error the rest is of no use
        for part in parts.values():
            part.close()


@contextlib.contextmanager
def _named(where: epath.Path) -> Iterator[None]:
    try:
        yield
    except (OSError, ValueError) as error:
        raise ValueError(_unreadable(where, error)) from error


def read_schema_1(folder: epath.Path, target: dict[str, Any]) -> dict[str, Any]:
    """`read` for the arrays of schema 1, which lie in orbax's default format."""
    restore = ocp.checkpoint_utils.construct_restore_args(target)
    try:
        with ocp.PyTreeCheckpointer() as reader:
            args = ocp.args.PyTreeRestore(item=target, restore_args=restore)
            restored: dict[str, Any] = reader.restore(folder.resolve(), args=args)
    except Exception as error:  # orbax raises the bare class for a chunk that cannot be decoded
        raise ValueError(_unreadable(folder, error)) from error
    return restored


def _unreadable(where: epath.Path, error: Exception) -> str:
    reason = (str(error).strip() or type(error).__name__).splitlines()[0][:300]
    return (
        f"{where}: the arrays cannot be read ({reason}). The folder is truncated or damaged; "
        "restore it from a copy."
    )


def _needed(leaf: jax.ShapeDtypeStruct) -> tuple[zarr.Box, dict[jax.Device, zarr.Box]]:
    """What the devices of this process need of an array: all of them, and each."""
    sharding = leaf.sharding
    assert isinstance(sharding, jax.sharding.Sharding)
    wanted = sharding.addressable_devices_indices_map(leaf.shape)
    bounds = {device: _bounds(index or (), leaf.shape) for device, index in wanted.items()}
    axes = list(zip(*bounds.values(), strict=True))
    box = tuple((min(a for a, _ in axis), max(b for _, b in axis)) for axis in axes)
    return box, bounds


def _on_devices(leaf: jax.ShapeDtypeStruct, host: np.ndarray) -> jax.Array:
    """Cuts what this process needs of an array for its devices."""
    sharding = leaf.sharding
    if isinstance(sharding, jax.sharding.SingleDeviceSharding):
        return jax.device_put(host, sharding)
    assert isinstance(sharding, jax.sharding.Sharding)
    box, bounds = _needed(leaf)
    shards = [
        jax.device_put(
            host[tuple(slice(a - c, b - c) for (a, b), (c, _) in zip(own, box, strict=True))],
            device,
        )
        for device, own in bounds.items()
    ]
    return jax.make_array_from_single_device_arrays(leaf.shape, sharding, shards)


def _flat_bytes(host: np.ndarray) -> np.ndarray:
    return host.reshape(-1).view(np.uint8)


def _bounds(index: tuple[slice, ...], shape: tuple[int, ...]) -> zarr.Box:
    return tuple(part.indices(n)[:2] for part, n in zip(index, shape, strict=True))
