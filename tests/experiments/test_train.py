"""The commands as a user starts them, each in its own process."""

import json
import os
import signal
import subprocess
import sys
import time

import pytest

CARD = """
from lowbit_jax.training.config import DataConfig, ModelConfig, OptimConfig, TrainConfig

def get_config(variant=""):
    return TrainConfig(
        name="tiny", recipe="w1_58a8", steps={steps}, batch=4, length=16,
        log_every=5, eval_every=1000, eval_batches=1, final_batches=2, checkpoint_every=20,
        sample_prompt="low ", sample_length=8,
        model=ModelConfig(dim=32, layers=1, heads=2, kv_heads=1, ffn_dim=32, max_length=32),
        data=DataConfig(source="text:{text}"), optim=OptimConfig(lr=1e-2, warmup=2),
    )
"""


@pytest.fixture
def card(tmp_path):
    (tmp_path / "words.txt").write_text("low bit scale code word float grid\n" * 300)
    path = tmp_path / "tiny.py"

    def write(steps):
        path.write_text(CARD.format(text=tmp_path / "words.txt", steps=steps))
        return path

    return write


def start(tmp_path, module, *arguments):
    environment = dict(os.environ, XLA_FLAGS="", JAX_PLATFORMS="cpu")
    return subprocess.Popen(
        [sys.executable, "-m", f"experiments.{module}", *map(str, arguments)],
        cwd=tmp_path,  # the package's configs are found from any directory
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def finished(tmp_path, module, *arguments):
    process = start(tmp_path, module, *arguments)
    out, err = process.communicate(timeout=300)
    assert process.returncode == 0, err
    return out


def losses(workdir):
    rows = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
    return [(row["step"], row["loss"]) for row in rows if row["kind"] == "train"]


def stop_after(workdir, step, process, number):
    """Sends a signal once the run has logged `step`."""
    deadline = time.monotonic() + 240
    while time.monotonic() < deadline and process.poll() is None:
        path = workdir / "metrics.jsonl"
        if path.exists() and any(f'"step": {step},' in line for line in path.open()):
            process.send_signal(number)
            break
        time.sleep(0.005)
    out, err = process.communicate(timeout=240)
    return process.returncode, out, err


@pytest.mark.slow
def test_sigterm_writes_a_checkpoint_and_says_how_to_go_on(tmp_path, card):
    process = start(tmp_path, "train", "--config", card(steps=100_000))
    code, _, err = stop_after(tmp_path / "runs" / "tiny", 10, process, signal.SIGTERM)
    assert code == 128 + signal.SIGTERM, err
    assert "stopped by SIGTERM after step" in err
    assert "Run the same command again" in err
    assert "Traceback" not in err
    step = int(err.split("after step ")[1].split(";")[0])
    assert (tmp_path / "runs" / "tiny" / "checkpoints" / str(step)).is_dir()


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM], ids=["SIGKILL", "SIGTERM"])
def test_a_killed_run_ends_where_an_uninterrupted_one_does(tmp_path, card, number):
    path = card(steps=600)
    finished(tmp_path, "train", "--config", path, "--workdir", "whole")
    for step in (15, 105, 350):
        process = start(tmp_path, "train", "--config", path, "--workdir", "killed")
        code, _, err = stop_after(tmp_path / "killed", step, process, number)
        assert code == (-number if number == signal.SIGKILL else 128 + number), err
    finished(tmp_path, "train", "--config", path, "--workdir", "killed")
    assert losses(tmp_path / "killed") == losses(tmp_path / "whole")
    summaries = [
        json.loads((tmp_path / name / "summary.json").read_text()) for name in ("killed", "whole")
    ]
    assert summaries[0]["valid"] == summaries[1]["valid"]
    assert summaries[0]["packed"]["valid_nll"] == summaries[1]["packed"]["valid_nll"]


@pytest.mark.slow
def test_a_run_can_be_evaluated_sampled_and_compared(tmp_path, card):
    path = card(steps=30)
    finished(tmp_path, "train", "--config", path)
    finished(tmp_path, "train", "--config", path, "--config.recipe=", "--workdir", "runs/float")
    run = tmp_path / "runs" / "tiny"
    own = json.loads(finished(tmp_path, "evaluate", "--checkpoint", run, "--json"))
    text = ("--source", f"text:{tmp_path}/words.txt", "--length", "8", "--max_windows", "16")
    other = json.loads(
        finished(tmp_path, "evaluate", "--checkpoint", run / "packed", *text, "--json")
    )
    assert (own["length"], other["length"], other["tokens"]) == (16, 8, 128)
    again = ("--checkpoint", run, "--prompt", "low ", "--length", "20", "--seed", "3")
    written = finished(tmp_path, "generate", *again)
    assert written.startswith("low ")
    assert written == finished(tmp_path, "generate", *again)
    shown = finished(tmp_path, "compare", "runs/tiny", "runs/float", "--out", "both")
    assert "| tiny | w1_58a8 |" in shown
    assert (tmp_path / "both" / "compare.png").exists()
    assert (tmp_path / "both" / "compare.md").exists()
