import json

import pytest

from lowbit_jax.training import workdir as folders
from lowbit_jax.training.config import TrainConfig
from lowbit_jax.training.errors import DiskFull


def test_new_unfinished_and_finished(tmp_path):
    config, run = TrainConfig(name="a"), tmp_path / "a"
    assert not folders.inspect(config, run)
    assert folders.claim(config, run) is None
    assert folders.read_config(run) == config
    assert folders.inspect(config, run), "an unfinished run of the same config resumes"
    (run / "summary.json").write_text("{}")
    with pytest.raises(ValueError, match=r"this run is finished .* --overwrite"):
        folders.inspect(config, run)


def test_another_config_is_refused_with_the_fields(tmp_path):
    folders.claim(TrainConfig(steps=7), tmp_path / "a")
    other = TrainConfig(steps=3).replace({"optim.lr": 1.0})
    with pytest.raises(
        ValueError,
        match=r"(?s)unfinished run of another config.*steps: 7 -> 3\n  optim.lr: 0.003 -> 1.0",
    ):
        folders.inspect(other, tmp_path / "a")


def test_overwrite_moves_to_the_next_free_backup(tmp_path):
    run = tmp_path / "a"
    for count in range(3):
        config = TrainConfig(steps=count + 1)
        assert not folders.inspect(config, run, overwrite=True)
        moved = folders.claim(config, run)
        assert moved == (tmp_path / f"a.{count}" if count else None)
    assert folders.read_config(tmp_path / "a.1").steps == 1
    assert folders.read_config(run).steps == 3


@pytest.mark.parametrize("overwrite", [False, True])
def test_a_folder_that_is_no_run_is_left_alone(tmp_path, overwrite):
    (tmp_path / "thesis.tex").write_text("precious")
    with pytest.raises(ValueError, match=r"holds no run .*left alone"):
        folders.inspect(TrainConfig(), tmp_path, overwrite=overwrite)


@pytest.mark.parametrize("content", ["", "[]", '{"steps": ', '{"stepz": 3}'])
def test_a_config_that_cannot_be_read_names_the_file(tmp_path, content):
    (tmp_path / "config.json").write_text(content)
    with pytest.raises(ValueError, match=r"config\.json: is no config of this version"):
        folders.inspect(TrainConfig(), tmp_path)


def test_writing_is_all_or_nothing(tmp_path, monkeypatch):
    path = tmp_path / "summary.json"
    folders.write_json(path, {"a": 1})
    with pytest.raises(TypeError):
        folders.write_json(path, {"a": object()})

    def full(_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(folders.os, "fsync", full)
    with pytest.raises(DiskFull, match=r"no space left .* while writing summary\.json"):
        folders.write_json(path, {"a": 2})
    assert json.loads(path.read_text()) == {"a": 1}
    assert [p.name for p in tmp_path.iterdir()] == ["summary.json"]
