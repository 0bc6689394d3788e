"""Tensors come out of torch's files, and nothing in them is executed."""

import collections
import contextlib
import io
import os
import pickle
import struct
import sys
import types
import zipfile

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from lowbit_jax.interop.torch_pickle import LEGACY, read_tensors

TENSORS = {
    "a": np.arange(6, dtype=np.float32).reshape(2, 3),
    "b": np.array(7, np.int64),
    "c": np.array([1, -1 / 3], np.float16),
}
KINDS = {np.float32: "FloatStorage", np.int64: "LongStorage", np.float16: "HalfStorage"}


class Saved:
    """What torch pickles a tensor as: a call of `_rebuild_tensor_v2` on a part of a storage."""

    def __init__(self, key, array, *, length=None, offset=0, strides=None):
        self.key, self.array, self.offset = key, array, offset
        self.length = array.size if length is None else length
        self.strides = strides or tuple(s // array.itemsize for s in array.strides)

    def __reduce__(self):
        storage = Reference(self.key, KINDS[self.array.dtype.type], self.length)
        rest = (False, collections.OrderedDict())
        args = (storage, self.offset, self.array.shape, self.strides, *rest)
        return sys.modules["torch._utils"]._rebuild_tensor_v2, args


class Reference:
    def __init__(self, key, kind, length):
        self.key, self.kind, self.length = key, kind, length


class Pickler(pickle.Pickler):
    def persistent_id(self, obj):
        if isinstance(obj, Reference):
            kind = getattr(sys.modules["torch"], obj.kind)
            return ("storage", kind, obj.key, "cpu", obj.length, *self.view)
        return None


@pytest.fixture(scope="module", autouse=True)
def torch():
    """Modules of torch's names, for pickle to write down; nothing of torch is needed."""
    torch, utils = types.ModuleType("torch"), types.ModuleType("torch._utils")
    for kind in [*KINDS.values(), "ComplexFloatStorage"]:
        setattr(torch, kind, type(kind, (), {"__module__": "torch"}))

    def _rebuild_tensor_v2():
        raise AssertionError("nothing may be called")

    _rebuild_tensor_v2.__module__ = "torch._utils"
    _rebuild_tensor_v2.__qualname__ = "_rebuild_tensor_v2"
    utils._rebuild_tensor_v2 = _rebuild_tensor_v2
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(sys.modules, "torch", torch)
        patch.setitem(sys.modules, "torch._utils", utils)
        yield


def pickled(content, *, view=(), protocol=2) -> bytes:
    stream = io.BytesIO()
    pickler = Pickler(stream, protocol)
    pickler.view = view
    pickler.dump(content)
    return stream.getvalue()


def legacy(content, arrays: dict[str, np.ndarray], *, protocol=1001, little=True, view=()) -> bytes:
    out = LEGACY + pickled(protocol) + pickled({"little_endian": little, "type_sizes": {"int": 4}})
    out += pickled(content, view=(None,) if view == () else view) + pickled(list(arrays))
    return out + b"".join(struct.pack("<Q", a.size) + a.tobytes() for a in arrays.values())


def zipped(content, arrays, *, compression=zipfile.ZIP_STORED, order=b"little") -> bytes:
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w", compression) as archive:
        archive.writestr("archive/data.pkl", pickled(content))
        archive.writestr("archive/byteorder", order)
        for key, array in arrays.items():
            archive.writestr(f"archive/data/{key}", array.tobytes())
    return out.getvalue()


def state_dict() -> collections.OrderedDict:
    saved = collections.OrderedDict((n, Saved(f"key {n}", a)) for n, a in TENSORS.items())
    saved._metadata = {"": {"version": 1}}  # as torch's modules leave it, an attribute
    return saved


ARRAYS = {f"key {name}": array for name, array in TENSORS.items()}


def check(tensors: dict[str, np.ndarray]) -> None:
    assert list(tensors) == list(TENSORS)
    for name, value in TENSORS.items():
        assert tensors[name].dtype == value.dtype
        np.testing.assert_array_equal(tensors[name], value)


@pytest.mark.parametrize("write", [legacy, zipped])
@pytest.mark.parametrize("wrap", [lambda s: s, lambda s: {"epoch": 3, "state_dict": s}])
def test_what_was_saved_is_read(save, write, wrap):
    check(read_tensors(save(write(wrap(state_dict()), ARRAYS), "x.th")))


def test_parts_of_one_storage_share_it(save):
    whole = np.arange(6, dtype=np.float32)
    parts = {
        "first": Saved("k", whole[:2], length=6),
        "second": Saved("k", whole[2:].reshape(2, 2), length=6, offset=2),
    }
    tensors = read_tensors(save(legacy(parts, {"k": whole}), "x.th"))
    np.testing.assert_array_equal(tensors["first"], [0, 1])
    np.testing.assert_array_equal(tensors["second"], [[2, 3], [4, 5]])


class Evil:
    def __reduce__(self):
        return os.mkdir, (self.folder,)


@pytest.mark.parametrize("write", [legacy, zipped])
@pytest.mark.parametrize("protocol", [0, 1, 2, 4])
def test_nothing_is_executed(save, tmp_path, monkeypatch, write, protocol):
    evil = Evil()
    evil.folder = str(tmp_path / "made")
    plain = pickled
    monkeypatch.setitem(
        globals(), "pickled", lambda content, **o: plain(content, **o | {"protocol": protocol})
    )
    content = write({"a": evil}, {})
    monkeypatch.undo()
    with pytest.raises(ValueError, match=r"nothing is called here|none that tensors need|x.th"):
        read_tensors(save(content, "x.th"))
    assert not (tmp_path / "made").exists()


@pytest.mark.parametrize("write", [legacy, zipped], ids=["legacy", "zipped"])
@given(data=st.data())
def test_a_truncated_file_is_an_error(tmp_path_factory, write, data):
    content = write(state_dict(), ARRAYS)
    path = tmp_path_factory.getbasetemp() / "truncated.th"
    path.write_bytes(content[: data.draw(st.integers(0, len(content) - 1))])
    with pytest.raises(ValueError, match=r"truncated\.th"):
        read_tensors(path)


@pytest.mark.parametrize("write", [legacy, zipped], ids=["legacy", "zipped"])
@given(data=st.data())
def test_a_changed_byte_is_an_error_or_a_file(tmp_path_factory, write, data):
    changed = bytearray(write(state_dict(), ARRAYS))
    for _ in range(data.draw(st.integers(1, 3))):
        changed[data.draw(st.integers(0, len(changed) - 1))] = data.draw(st.integers(0, 255))
    path = tmp_path_factory.getbasetemp() / "changed.th"
    path.write_bytes(changed)
    with contextlib.suppress(ValueError, NotImplementedError):
        tensors = read_tensors(path)
        assert sum(t.nbytes for t in tensors.values()) <= len(tensors) * len(changed)


A = TENSORS["a"]


@pytest.mark.parametrize(
    ("content", "error", "message"),
    [
        (lambda: b"", ValueError, r"not a file that torch.save wrote"),
        (lambda: LEGACY, ValueError, r"no sound pickle"),
        (lambda: legacy(state_dict(), ARRAYS, protocol=7), ValueError, r"protocol is not 1001"),
        (lambda: legacy(state_dict(), ARRAYS, little=False), NotImplementedError, r"big-endian"),
        (lambda: zipped(state_dict(), ARRAYS, order=b"big"), NotImplementedError, r"big-endian"),
        (lambda: legacy([1], {}), ValueError, r"no state dict"),
        (lambda: legacy({"a": 1}, {}), ValueError, r"entry 'a' .* not a named tensor"),
        (lambda: legacy({(1,): 1}, {}), ValueError, r"keys of a dict are not names"),
        (lambda: legacy(state_dict(), {}), ValueError, r"not those that its tensors use"),
        (
            lambda: legacy({"a": Saved("k", A, length=5)}, {"k": A[0]}),
            ValueError,
            r"reaches beyond its storage of 5",
        ),
        (
            lambda: legacy({"a": Saved("k", A, length=2**60)}, {"k": A}),
            ValueError,
            r"storage k has 6 elements",
        ),
        (
            lambda: zipped({"a": Saved("k", A, length=2**60)}, {"k": A}),
            ValueError,
            r"storage k has another size",
        ),
        (
            lambda: legacy({"a": Saved("k", A, strides=(1, 2))}, {"k": A}),
            NotImplementedError,
            r"not contiguous: \(1, 2\)",
        ),
        (
            lambda: legacy({"a": Saved("k", A)}, {"k": A}, view=(("k", 0, 6),)),
            NotImplementedError,
            r"a part of one",
        ),
        (
            lambda: legacy({"a": Saved("k", A), "b": Saved("k", TENSORS["b"])}, {"k": A}),
            ValueError,
            r"storage k is described in two ways",
        ),
        (
            lambda: zipped(state_dict(), ARRAYS, compression=zipfile.ZIP_DEFLATED),
            ValueError,
            r"missing or compressed",
        ),
        (lambda: zipped(state_dict(), {}), ValueError, r"data/key a is missing"),
        (lambda: b"PK\x03\x04" + bytes(40), ValueError, r"damaged zip"),
    ],
)
def test_a_lie_is_named(save, content, error, message):
    with pytest.raises(error, match=message):
        read_tensors(save(content(), "x.th"))
