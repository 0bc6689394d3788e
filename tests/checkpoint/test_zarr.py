"""Arrays on disk: what we write orbax reads, what orbax writes we read; whole and in parts."""

import json
import shutil

import jax
import numpy as np
import orbax.checkpoint as ocp
import pytest
import tensorstore
from etils import epath
from hypothesis import given, settings
from hypothesis import strategies as st

from lowbit_jax.checkpoint import arrays, zarr

SHAPES = [(), (5,), (3, 1), (2, 3, 4)]
TYPES = ["bfloat16", "float8_e4m3fn", "float8_e8m0fnu", "bool", "uint8", "int32", "float32"]


def random_array(shape, dtype):
    raw = np.random.default_rng(0).integers(0, 2, (*shape, np.dtype(dtype).itemsize), np.uint8)
    return raw.view(dtype)[..., 0]


def written(folder, tree):
    writer = arrays.Writer()
    writer.start(epath.Path(folder), tree)
    writer.finish()
    return epath.Path(folder)


@pytest.fixture(scope="module", params=["ours", "orbax's"])
def everything(request, tmp_path_factory):
    """Arrays of every type and rank, and where they lie; written as on a local disk and not."""
    tree = {
        f"{name}_{len(shape)}": random_array(shape, jax.numpy.dtype(name))
        for name in TYPES
        for shape in SHAPES
    }
    on_device = {name: jax.device_put(x) for name, x in tree.items()}
    with pytest.MonkeyPatch.context() as patch:
        if request.param != "ours":
            patch.setattr(zarr, "is_local", lambda path: False)
        return written(tmp_path_factory.mktemp("zarr") / "a", on_device), tree


def test_arrays_of_any_type_and_rank_are_read(everything):
    folder, tree = everything
    for name, array in tree.items():
        got = zarr.read(folder / name, array.shape, array.dtype, tuple((0, n) for n in array.shape))
        assert (got.shape, got.dtype) == (array.shape, array.dtype)
        assert got.tobytes() == array.tobytes()
        assert got.ctypes.data % 64 == 0, "the CPU backend would copy it"


def test_orbax_reads_them(everything):
    folder, tree = everything
    restore = {name: ocp.RestoreArgs(restore_type=np.ndarray) for name in tree}
    with ocp.PyTreeCheckpointer() as reader:
        args = ocp.args.PyTreeRestore(restore_args=restore)
        restored = reader.restore(folder.resolve(), args=args)
    assert restored.keys() == tree.keys()
    for name, array in tree.items():
        got = np.asarray(restored[name])
        assert (got.shape, got.dtype) == (array.shape, array.dtype)
        assert got.tobytes() == array.tobytes()


@given(
    shape=st.lists(st.integers(1, 7), max_size=3).map(tuple),
    most=st.integers(1, 64),
    dtype=st.sampled_from(["bfloat16", "int32", "uint8"]),
)
@settings(max_examples=30)
def test_any_shape_in_files_of_any_length(tmp_path_factory, shape, most, dtype):
    """The last file of an axis is as long as the others: tensorstore and we leave the rest out."""
    folder = epath.Path(tmp_path_factory.mktemp("write")) / "x"
    array = random_array(shape, jax.numpy.dtype(dtype))
    zarr.write(folder, array, most)
    files = [file for file in folder.iterdir() if file.name != ".zarray"]
    assert len({file.stat().length for file in files}) == 1
    assert files[0].stat().length <= max(most, array.itemsize)
    box = tuple((0, n) for n in shape)
    assert zarr.read(folder, shape, array.dtype, box).tobytes() == array.tobytes()
    spec = {"driver": "zarr", "kvstore": {"driver": "file", "path": str(folder)}}
    assert tensorstore.open(spec).result().read().result().tobytes() == array.tobytes()
    with pytest.raises(FileExistsError):
        zarr.write(folder, array, most)


@pytest.fixture(scope="module")
def in_chunks(tmp_path_factory):
    """64 x 16 numbers in files of 8 rows each, and the numbers."""
    patch = pytest.MonkeyPatch()
    patch.setattr(arrays, "CHUNK", 4 * 16 * 8)
    array = np.arange(64 * 16, dtype=np.float32).reshape(64, 16)
    folder = written(tmp_path_factory.mktemp("zarr") / "a", {"x": jax.device_put(array)})
    patch.undo()
    return folder / "x", array


def test_a_part_reads_the_chunks_that_hold_it(in_chunks, monkeypatch):
    """What a process of a larger run does, whose devices have some rows only."""
    folder, array = in_chunks
    fill, files = zarr._fill, []
    monkeypatch.setattr(zarr, "_fill", lambda file, x: (files.append(file.name), fill(file, x)))
    part = zarr.read(folder, array.shape, array.dtype, ((20, 30), (3, 9)))
    np.testing.assert_array_equal(part, array[20:30, 3:9])
    assert files == ["2.0", "3.0"], "rows 16 to 31"


def spans(length):
    ends = st.integers(0, length)
    return st.tuples(ends, ends).map(sorted)


@given(rows=spans(64), columns=spans(16))
def test_any_part_is_that_of_the_array(in_chunks, rows, columns):
    folder, array = in_chunks
    part = zarr.read(folder, array.shape, array.dtype, (tuple(rows), tuple(columns)))
    np.testing.assert_array_equal(part, array[slice(*rows), slice(*columns)])


@given(data=st.data())
def test_headers_of_noise_are_refused_and_allocate_nothing(in_chunks, tmp_path_factory, data):
    folder, array = in_chunks
    text = (folder / ".zarray").read_bytes()
    at = data.draw(st.integers(0, len(text) - 1))
    noise = text[:at] + data.draw(st.binary(max_size=8)) + text[at + data.draw(st.integers(0, 8)) :]
    other = epath.Path(tmp_path_factory.mktemp("noise"))
    (other / ".zarray").write_bytes(noise)
    # Without chunks beside it even a header that happens to be right leads to a missing file.
    with pytest.raises((ValueError, OSError)):
        zarr.read(other, array.shape, array.dtype, ((0, 64), (0, 16)))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"compressor": {"id": "zstd"}}, "compressor is {'id': 'zstd'} on disk and None"),
        ({"order": "F"}, "order is 'F' on disk and 'C'"),
        ({"zarr_format": 3}, "zarr_format is 3"),
        ({"chunks": [64, 2**60]}, "do not fit the shape"),
        ({"chunks": [0, 16]}, "do not fit the shape"),
        ({"chunks": [True, 16]}, "do not fit the shape"),
        ({"chunks": [64, 16]}, "0.0 has 512 bytes instead of 4096"),
        ({"dimension_separator": "/../"}, "dimension_separator"),
    ],
)
def test_headers_of_other_arrays_are_refused_by_name(in_chunks, tmp_path, change, message):
    folder, array = in_chunks
    shutil.copytree(folder, tmp_path / "x")
    header = tmp_path / "x" / ".zarray"
    header.write_text(json.dumps(json.loads(header.read_text()) | change))
    with pytest.raises(ValueError, match=message):
        zarr.read(epath.Path(tmp_path / "x"), array.shape, array.dtype, ((0, 64), (0, 16)))
