"""The study's logic, with runs that only write the summary they would have left."""

import json

import pytest

from experiments import study as module
from lowbit_jax.training.config import OptimConfig, TrainConfig

BEST_LR = {"float": 1e-3, "low": 4e-3}


@pytest.fixture
def trained(monkeypatch):
    """Replaces training; the loss is least at BEST_LR, and grows with the seed."""
    runs = []

    def train(config, workdir):
        runs.append((config.name, config.optim.lr, config.seed, config.steps))
        off = abs(config.optim.lr - BEST_LR[config.name]) * 100
        bits = (2.0 if config.name == "float" else 2.25) + off + 0.01 * config.seed
        summary = {
            "valid": {"bits_per_byte": bits},
            "packed": {"bits_per_byte": bits, "bits_per_weight": 2.0},
            "tokens": 20_000_000,
        }
        workdir.mkdir(parents=True)
        (workdir / "summary.json").write_text(json.dumps(summary))
        return summary

    monkeypatch.setattr(module, "train", train)
    return runs


def _configs():
    return {
        name: TrainConfig(name=name, recipe=recipe, steps=100, optim=OptimConfig())
        for name, recipe in (("float", ""), ("low", "w1_58a8"))
    }


def test_each_config_runs_all_seeds_at_its_own_best_learning_rate(trained, tmp_path):
    text = module.study(_configs(), tmp_path, lrs=[1e-3, 4e-3], seeds=[0, 1, 2], tune_share=0.25)

    tuning = [run for run in trained if run[3] == 25]
    final = [run for run in trained if run[3] == 100]
    assert len(tuning) == 4
    assert sorted(final) == sorted(
        (name, BEST_LR[name], seed, 100) for name in BEST_LR for seed in range(3)
    )
    low = next(line for line in text.splitlines() if line.startswith("| low"))
    # mean of 2.25, 2.26, 2.27; sample standard deviation 0.01; gaps to 2.00, 2.01, 2.02 all alike
    assert "| 2.2600 | 0.0100 | 3 | +0.2500 | 0.0000 |" in low
    assert (tmp_path / "study.md").read_text() == text


def test_a_second_call_trains_nothing_that_is_finished(trained, tmp_path):
    arguments = {"lrs": [1e-3, 4e-3], "seeds": [0], "tune_share": 0.25}
    first = module.study(_configs(), tmp_path, **arguments)
    count = len(trained)
    assert module.study(_configs(), tmp_path, **arguments) == first
    assert len(trained) == count


def test_a_single_learning_rate_is_taken_untried(trained, tmp_path):
    text = module.study(_configs(), tmp_path, lrs=[2e-3], seeds=[0], tune_share=0.25)
    assert [(name, lr) for name, lr, _, _ in trained] == [("float", 2e-3), ("low", 2e-3)]
    assert "| 0.002 |" in text
