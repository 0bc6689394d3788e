import json
import os
import signal

import numpy as np
import pytest

from lowbit_jax.reporting.metrics import read_metrics, series
from lowbit_jax.reporting.progress import TrainProgress
from lowbit_jax.training import loop
from lowbit_jax.training.config import MeshConfig
from lowbit_jax.training.errors import CheckpointError, Interrupted, NotFinite


def without_times(workdir):
    return [
        {k: v for k, v in row.items() if k != "tokens_per_second"} for row in read_metrics(workdir)
    ]


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory):
    """Rows of one whole run, by config; the reference for all that are stopped on their way."""
    found = {}

    def rows(config, console):
        key = json.dumps(loop.folders.to_dict(config))
        if key not in found:
            workdir = tmp_path_factory.mktemp("whole") / "run"
            loop.train_steps(config, workdir, console=console)
            found[key] = without_times(workdir)
        return found[key]

    return rows


def at_step(monkeypatch, step, act):
    """Calls `act` when the loss of `step` has been read."""
    update = TrainProgress.update

    def acting(self, now, *args):
        update(self, now, *args)
        if now == step:
            act()

    monkeypatch.setattr(TrainProgress, "update", acting)


@pytest.mark.parametrize("recipe", [pytest.param("", marks=pytest.mark.slow), "w1_58a8"])
def test_a_run_stopped_by_sigterm_goes_on_bit_for_bit(
    tiny, quiet, tmp_path, monkeypatch, uninterrupted, recipe
):
    tiny.recipe = recipe
    whole = uninterrupted(tiny, quiet)
    with monkeypatch.context() as patch:
        at_step(patch, 5, lambda: os.kill(os.getpid(), signal.SIGTERM))
        with pytest.raises(
            Interrupted, match=r"SIGTERM after step \d; .* Run the same command"
        ) as stop:
            loop.train_steps(tiny, tmp_path / "run", console=quiet)
    assert stop.value.exit_code == 128 + signal.SIGTERM
    loop.train_steps(tiny, tmp_path / "run", console=quiet)
    assert "resuming" in quiet.file.getvalue()
    assert without_times(tmp_path / "run") == whole


class Killed(BaseException):
    """Stands for SIGKILL: nothing of the loop runs after it."""


@pytest.mark.parametrize(
    "step", [pytest.param(2, marks=pytest.mark.slow), 4, pytest.param(7, marks=pytest.mark.slow)]
)
def test_a_killed_run_loses_only_what_came_after_its_checkpoint(
    tiny, quiet, tmp_path, monkeypatch, uninterrupted, step
):
    tiny.recipe = "w1_58a8"

    def kill():
        raise Killed

    with monkeypatch.context() as patch:
        at_step(patch, step, kill)
        with pytest.raises(Killed):
            loop.train_steps(tiny, tmp_path / "run", console=quiet)
    with (tmp_path / "run" / "metrics.jsonl").open("a") as file:
        file.write('{"step": 99, "kind": "tr')  # cut short in the middle of a row
    loop.train_steps(tiny, tmp_path / "run", console=quiet)
    assert without_times(tmp_path / "run") == uninterrupted(tiny, quiet)


def test_data_parallel_losses_are_those_of_one_device(tiny, quiet, tmp_path, uninterrupted):
    one = uninterrupted(tiny, quiet)
    tiny.mesh = MeshConfig(data=-1)
    run = loop.train_steps(tiny, tmp_path / "run", console=quiet)
    assert run.mesh.size == 8
    got, expected = (
        series(rows, "train", "loss")[1] for rows in (without_times(tmp_path / "run"), one)
    )
    # 128 losses and their gradients are summed in another order: eps * 128 a step. Adam divides by
    # the gradient's size, so that an element of any size can carry it on into all 12 steps, each
    # with at most its whole relative error.
    np.testing.assert_allclose(got, expected, rtol=12 * 128 * np.finfo(np.float32).eps)


def test_a_loss_that_is_not_finite_stops_the_run_and_keeps_the_checkpoint(
    tiny, quiet, tmp_path, monkeypatch
):
    make = loop.make_train_step

    def poisoned(*args, **kwargs):
        step, count = make(*args, **kwargs), iter(range(100))

        def wrapped(state, windows):
            state, metrics = step(state, windows)
            bad = next(count) == 5
            return state, metrics._replace(loss=metrics.loss * np.nan) if bad else metrics

        return wrapped

    monkeypatch.setattr(loop, "make_train_step", poisoned)
    with pytest.raises(NotFinite, match=r"step 6: loss nan.*last good checkpoint, of step 4"):
        loop.train_steps(tiny, tmp_path / "run", console=quiet)
    assert sorted(p.name for p in (tmp_path / "run" / "checkpoints").iterdir()) == ["4"]


def test_changed_text_is_no_resume(tiny, quiet, tmp_path, monkeypatch):
    text = tmp_path / "text.txt"
    text.write_text("one word after another\n" * 400)
    tiny.data.source = f"text:{text}"
    with monkeypatch.context() as patch:
        at_step(patch, 5, lambda: os.kill(os.getpid(), signal.SIGINT))
        with pytest.raises(Interrupted, match="SIGINT"):
            loop.train_steps(tiny, tmp_path / "run", console=quiet)
    text.write_text("other words in another text\n" * 400)
    with pytest.raises(CheckpointError, match="would not be the same run"):
        loop.train_steps(tiny, tmp_path / "run", console=quiet)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"recipe": "w9a9"}, "no preset is named 'w9a9'"),
        ({"recipe": ".*nothing.*=w4a16"}, "matches no layer"),
        ({"data.source": "text:/no/such/file"}, "no file matches"),
        ({"batch": 4000}, "less than one batch"),
        ({"mesh.data": 3}, "does not split over 3 devices"),
    ],
)
def test_wrong_input_leaves_nothing_behind(tiny, quiet, tmp_path, change, message):
    with pytest.raises((ValueError, OSError), match=message):
        loop.train(tiny.replace(change), tmp_path / "run", console=quiet)
    assert not (tmp_path / "run").exists()


@pytest.mark.slow
def test_calibrated_activations_are_found_before_the_first_step(tiny, quiet, tmp_path):
    run = loop.train_steps(
        tiny.replace({"recipe": "nvfp4", "calibrate_every": 5, "steps": 3}),
        tmp_path / "run",
        console=quiet,
    )
    stats = [
        np.asarray(leaf)
        for leaf in loop.jax.tree.leaves(run.state.rest)
        if leaf.dtype == np.float32
    ]
    assert stats
    assert all(np.isfinite(s).all() and (s > 0).all() for s in stats)
    assert np.isfinite(series(without_times(tmp_path / "run"), "train", "loss")[1]).all()
