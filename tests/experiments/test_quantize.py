"""The command as a user starts it, and its cards."""

import json
import os
import subprocess
import sys

import pytest

from experiments import config_files
from lowbit_jax.ptq.job import QuantizeConfig
from lowbit_jax.ptq.job.pipelines import make_pipeline, make_recipe
from lowbit_jax.ptq.job.run import check_sizes

CARDS = [name for name in config_files.available() if name.startswith("ptq_")]


def command(folder, module, *arguments):
    environment = dict(os.environ, XLA_FLAGS="", JAX_PLATFORMS="cpu")
    return subprocess.run(
        [sys.executable, "-m", f"experiments.{module}", *map(str, arguments)],
        cwd=folder,
        env=environment,
        capture_output=True,
        text=True,
        timeout=900,
        check=False,
    )


@pytest.mark.parametrize("variant", ["", "smoke"])
@pytest.mark.parametrize("card", CARDS)
def test_every_card_makes_its_pipeline(card, variant):
    config = config_files.load(card, variant)
    assert config.name == card.removesuffix(".py") + (f"_{variant}" if variant else "")
    assert make_pipeline(config)
    make_recipe(config)
    check_sizes(config)


def test_every_method_has_its_card():
    methods = ["rtn", "gptq", "awq", "smoothquant", "brecq", "omniquant", "autoround", "quarot"]
    assert {f"ptq_{method}.py" for method in methods} <= set(CARDS)


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--config=float.py"], "is a TrainConfig, and this command takes a QuantizeConfig: ptq_"),
        (["--config=ptq_gptq.py:pod"], "ptq_gptq has no variant 'pod'; it has: smoke"),
        (["--config=ptq_gptq.py", "--config.gptq.ordr=x"], "no field 'ordr'; it has: order"),
        ([], r"--config is missing, such as --config ptq_.*; there are: ptq_autoround\.py"),
    ],
)
def test_wrong_commands_list_what_is_right(argv, message):
    with pytest.raises(ValueError, match=message):
        config_files.resolve(["prog", *argv], kind=QuantizeConfig)


def test_train_refuses_a_card_of_this_command():
    with pytest.raises(ValueError, match=r"is a QuantizeConfig, and this command takes a Train"):
        config_files.resolve(["prog", "--config=ptq_rtn.py"])


@pytest.mark.slow
def test_stories260k_from_the_command_line_to_the_leaderboard(tmp_path, assets):
    """On a few tokens; every field is given as a user types it."""
    text = assets / "tinystories"
    common = (
        f"--config.model.path={assets / 'stories260k' / 'stories260K.gguf'}",
        "--config.rules=.*/down=w4a16_asym;.*=w4a16_g32_asym",
        f"--config.calibration.source=text:{text / 'train.txt'}",
        "--config.calibration.separator=<|endoftext|>",
        "--config.calibration.sequences=16",
        f"--config.evaluation.source=text:{text / 'valid.txt'}",
        "--config.evaluation.separator=<|endoftext|>",
        "--config.evaluation.sequences=40",
    )
    increases = {}
    for method in ("rtn", "gptq"):
        done = command(tmp_path, "quantize", "--config", f"ptq_{method}.py", *common)
        assert done.returncode == 0, done.stderr
        summary = json.loads((tmp_path / "runs" / f"ptq_{method}" / "summary.json").read_text())
        assert abs(summary["packed"]["nll"] - summary["fake_quant"]["nll"]) < 1e-4
        increases[method] = summary["packed"]["nll"] - summary["float"]["nll"]
    assert 0 < increases["gptq"] < increases["rtn"] < 0.2

    again = command(tmp_path, "quantize", "--config", "ptq_rtn.py", *common)
    assert again.returncode == 1
    assert "this run is finished" in again.stderr
    shown = command(tmp_path, "compare", "runs/ptq_rtn", "runs/ptq_gptq", "--out", "both")
    assert "# Leaderboard" in shown.stdout
    assert (tmp_path / "both" / "compare.png").exists()
    told = command(
        tmp_path, "generate", "--checkpoint", "runs/ptq_gptq", "--prompt", "Once upon a time",
        "--length", "20", "--temperature", "0",
    )  # fmt: skip
    assert told.stdout.startswith("Once upon a time"), told.stderr
