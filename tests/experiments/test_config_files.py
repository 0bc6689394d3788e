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
