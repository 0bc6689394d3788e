"""Whoever dies while saving leaves what was there before, and the next save finds its way."""

import os
import re

import jax
import numpy as np
import pytest
from etils import epath
from flax import nnx

import lowbit_jax as lb
from lowbit_jax.checkpoint import arrays, folder


class Killed(BaseException):
    """What a test raises where a process would die."""


def killed(*args, **kwargs):
    raise Killed


@pytest.fixture(scope="module")
def digests(model, packed):
    return {"float": lb.checkpoint.digest(model), "packed": lb.checkpoint.digest(packed)}


def names(path):
    return sorted(p.name for p in path.iterdir())


def loaded_digest(path):
    return lb.checkpoint.digest(lb.checkpoint.load(path, verify=True))


def test_an_existing_path_is_kept_unless_it_may_be_overwritten(model, packed, digests, tmp_path):
    path = tmp_path / "c"
    lb.checkpoint.save(path, model)
    with pytest.raises(ValueError, match=re.escape(f"{path} exists already")):
        lb.checkpoint.save(path, packed)
    assert loaded_digest(path) == digests["float"]
    for turn in (1, 2):
        lb.checkpoint.save(path, packed, overwrite=True)
        assert loaded_digest(path) == digests["packed"]
        assert names(path) == [f"arrays-{turn}", "manifest.json"], "nothing old is left"
    assert names(tmp_path) == ["c"], "nothing is left beside it"


def test_folders_of_others_are_not_written_into_unasked(model, tmp_path):
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(ValueError, match=r"is no checkpoint: it holds \['notes.txt'\]"):
        lb.checkpoint.save(tmp_path, model)
    lb.checkpoint.save(tmp_path, model, overwrite=True)
    assert names(tmp_path) == ["arrays", "manifest.json", "notes.txt"]


def after(function, calls=1):
    """The function, which dies as it ends, in its call of this number."""
    left = [calls]

    def dying(*args):
        function(*args)
        left[0] -= 1
        if not left[0]:
            raise Killed

    return dying


STEPS = {
    "when the arrays are written": (arrays.Writer, "finish", after(arrays.Writer.finish)),
    "before the manifest": (folder, "_replace", killed),
    "while writing the manifest": (os, "replace", killed),
    "when the manifest is written": (folder, "_replace", after(folder._replace)),
    # Once before anything is written, and once when all is.
    "when the old arrays are removed": (
        folder, "_remove_all_but", after(folder._remove_all_but, calls=2),
    ),
}  # fmt: skip


@pytest.mark.parametrize("step", STEPS)
def test_a_death_leaves_the_old_or_the_new_checkpoint(
    step, model, packed, digests, tmp_path, monkeypatch
):
    path = tmp_path / "c"
    lb.checkpoint.save(path, model)
    monkeypatch.setattr(*STEPS[step])
    with pytest.raises(Killed):
        lb.checkpoint.save(path, packed, overwrite=True)
    monkeypatch.undo()
    committed = step in ("when the manifest is written", "when the old arrays are removed")
    assert loaded_digest(path) == digests["packed" if committed else "float"]
    lb.checkpoint.save(path, packed, overwrite=True)
    assert loaded_digest(path) == digests["packed"]
    (current,) = (p for p in names(path) if p != "manifest.json")
    assert current == lb.checkpoint.read_manifest(path)["arrays"]


def test_a_first_save_that_died_is_no_checkpoint_and_in_nobodys_way(
    model, digests, tmp_path, monkeypatch
):
    path = tmp_path / "c"
    monkeypatch.setattr(folder, "_replace", killed)
    with pytest.raises(Killed):
        lb.checkpoint.save(path, model)
    monkeypatch.undo()
    (path / "arrays-7.orbax-checkpoint-tmp").mkdir()
    with pytest.raises(ValueError, match=r"no checkpoint here .* first save was interrupted"):
        lb.checkpoint.load(path)
    lb.checkpoint.save(path, model)
    assert names(path) == ["arrays", "manifest.json"]
    assert loaded_digest(path) == digests["float"]


def test_a_failing_disk_leaves_the_old_checkpoint(model, packed, digests, tmp_path, monkeypatch):
    lb.checkpoint.save(tmp_path / "c", model)

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space left"):
        lb.checkpoint.save(tmp_path / "c", packed, overwrite=True)
    monkeypatch.undo()
    assert loaded_digest(tmp_path / "c") == digests["float"]


def test_what_a_schema_1_writer_had_moved_aside_is_found(packed, model, digests, tmp_path):
    path, aside = tmp_path / "c", tmp_path / ".c.previous"
    lb.checkpoint.save(path, model)
    path.rename(aside)
    (tmp_path / ".c.partial").mkdir()
    assert loaded_digest(path) == digests["float"]
    assert aside.exists(), "loading changes nothing"
    with pytest.raises(ValueError, match="exists already"):
        lb.checkpoint.save(path, packed)
    lb.checkpoint.save(path, packed, overwrite=True)
    assert loaded_digest(path) == digests["packed"]
    assert names(tmp_path) == ["c"]


def test_a_damaged_manifest_keeps_its_arrays_until_the_new_ones_are_named(
    model, packed, digests, tmp_path, monkeypatch
):
    path = tmp_path / "c"
    lb.checkpoint.save(path, model)
    text = (path / "manifest.json").read_text()
    (path / "manifest.json").write_text(text[:50])
    monkeypatch.setattr(folder, "_replace", killed)
    with pytest.raises(Killed):
        lb.checkpoint.save(path, packed, overwrite=True)
    monkeypatch.undo()
    (path / "manifest.json").write_text(text)  # repaired from a copy
    assert loaded_digest(path) == digests["float"]


def test_metadata_that_is_no_json_writes_nothing(model, tmp_path):
    with pytest.raises(TypeError, match="JSON"):
        lb.checkpoint.save(tmp_path / "c", model, metadata={"key": {1, 2}})
    assert not list(tmp_path.iterdir())


def test_no_folder_is_renamed_on_an_object_store(model, packed, digests, tmp_path, monkeypatch):
    """Where a put is atomic and a rename is a copy, nothing but the manifest commits."""
    path = tmp_path / "c"
    monkeypatch.setattr(folder, "is_local", lambda _: False)
    cls = type(epath.Path("/"))
    rename, order = cls.rename, []

    def renamed(self, target):
        # Orbax moves its own folder on a disk, and on gs:// writes a mark into it.
        assert ".orbax-checkpoint-tmp" in self.name, f"{self} is renamed"
        order.append("arrays")
        return rename(self, target)

    write_text = cls.write_text

    def written(self, text, *args, **kwargs):
        order.append(self.name)
        return write_text(self, text, *args, **kwargs)

    monkeypatch.setattr(cls, "rename", renamed)
    monkeypatch.setattr(cls, "write_text", written)
    monkeypatch.setattr(os, "replace", killed)
    for content in (model, packed):
        lb.checkpoint.save(path, content, overwrite=True)
        assert order[-1] == "manifest.json", "the commit comes last"
    monkeypatch.undo()
    assert loaded_digest(path) == digests["packed"]


def test_paths_behind_a_scheme_are_told_from_disks():
    assert folder.is_local(epath.Path("/data/model"))
    assert not folder.is_local(epath.Path("gs://bucket/model"))


def test_a_model_may_change_once_save_async_has_returned(model, tmp_path):
    graphdef, state = nnx.split(nnx.clone(model))
    state = jax.tree.map(lambda x: jax.device_put(np.asarray(x).copy()), state)
    own = nnx.merge(graphdef, state)
    expected = lb.checkpoint.digest(own)
    future = lb.checkpoint.save_async(tmp_path / "c", own)
    spend = jax.jit(lambda s: jax.tree.map(lambda x: x * 0 - 1, s), donate_argnums=0)
    jax.block_until_ready(spend(nnx.state(own)))
    assert future.result(timeout=60) is None
    assert loaded_digest(tmp_path / "c") == expected


def test_what_fails_in_the_background_is_raised_by_the_result(model, tmp_path, monkeypatch):
    monkeypatch.setattr(folder, "_replace", killed)
    future = lb.checkpoint.save_async(tmp_path / "c", model)
    with pytest.raises(Killed):
        future.result(timeout=60)
