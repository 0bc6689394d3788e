import importlib.util
from pathlib import Path

import pytest

from experiments import config_files
from lowbit_jax import presets
from lowbit_jax.training.validation import validate

CARDS = ["float.py", "qat_binary.py", "qat_fp4.py", "qat_int4.py", "qat_ternary.py"]


@pytest.mark.parametrize("variant", ["", "smoke", "study", "pod"])
@pytest.mark.parametrize("card", CARDS)
def test_every_card_has_its_variants_and_is_valid(card, variant):
    config = config_files.load(card, variant)
    validate(config)
    assert config.name == card.removesuffix(".py") + (f"_{variant}" if variant else "")
    assert not config.recipe or config.recipe in presets


def test_cards_are_found_by_path_by_name_and_without_suffix(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert config_files.find_file("float") == config_files.find_file("float.py")
    (tmp_path / "float.py").write_text("def get_config():\n    return 'mine'\n")
    assert config_files.load("float.py") == "mine", "a path goes before the package's configs"
    assert set(CARDS) <= set(config_files.available())


def test_argv_is_rewritten_in_place_for_both_spellings():
    path = config_files.find_file("float.py")
    joined = ["prog", "--config=float.py:smoke", "--config.optim.lr=1", "--noconfig.model.tied"]
    assert config_files.resolve(joined) == ["prog", f"--config={path}:smoke", *joined[2:]]
    assert config_files.resolve(["prog", "--config", "float", "--workdir", "w"]) == [
        "prog",
        f"--config={path}",
        "--workdir",
        "w",
    ]


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        ([], r"--config is missing.*float\.py, qat_binary\.py"),
        (["--config=qat_tern.py"], r"no config 'qat_tern\.py'.*which has: qat_ternary\.py"),
        (["--config=float.py:smok"], "float has no variant 'smok'; it has: smoke, pod"),
        (
            ["--config=float.py", "--config.optim.warmpu=3"],
            "OptimConfig has no field 'warmpu'; it has: warmup",
        ),
        (
            ["--config=float.py", "--config.stepz", "3"],
            "TrainConfig has no field 'stepz'; it has: steps",
        ),
        (["--config=float.py", "--config.steps.x=3"], "a int has no field 'x'"),
    ],
)
def test_what_is_wrong_is_listed_beside_what_is_right(argv, message):
    with pytest.raises(ValueError, match=message):
        config_files.resolve(["prog", *argv])


def test_a_file_that_is_no_config_says_so(tmp_path):
    path = tmp_path / "empty.py"
    path.write_text("")
    with pytest.raises(ValueError, match="defines no get_config"):
        config_files.load(str(path))


def test_entry_points_are_short():
    for name in ("train", "evaluate", "generate", "compare"):
        spec = importlib.util.find_spec(f"experiments.{name}")
        source = Path(spec.origin).read_text()
        body = source[source.index("def main(") :].split("\n\n\n")[0]
        assert len(body.splitlines()) <= 40


def test_more_rows_are_cards_with_fields_of_their_own():
    also = "slow qat_ternary.py optim.lr=1 'recipe=.*/down=w8a8; .*=w1_58a16' model.tied=true"
    cards = config_files.rows(["float.py"], [also], "study", ["steps=7"])
    assert list(cards) == ["float", "slow"]
    assert (cards["slow"].optim.lr, cards["slow"].model.tied) == (1, True)
    assert cards["slow"].recipe == ".*/down=w8a8; .*=w1_58a16"
    assert cards["float"].steps == cards["slow"].steps == 7
    cards = config_files.rows([], ["tied float.py model.tied=True"], "study", [])
    assert cards["tied"].model.tied is True  # as --config.model.tied=True takes it


@pytest.mark.parametrize(
    ("also", "message"),
    [
        ("slow", "new NAME"),
        ("float float.py", "new NAME"),
        ("slow float.py steps", "form PATH=VALUE"),
        ("slow float.py steps=many", "steps is a int, as 9800"),
        ("slow float.py model.tied=1", "model.tied is a bool, as False"),
        ("slow float.py optim.momentum=0.9", "momentum"),
    ],
)
def test_a_row_that_means_nothing_is_refused(also, message):
    with pytest.raises(ValueError, match=message):
        config_files.rows(["float.py"], [also], "study", [])
