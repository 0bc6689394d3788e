"""The leaderboard's logic, with runs that only write the summary they would have left."""

import json

import pytest

from experiments import ptq_study as module
from lowbit_jax.ptq.job import QuantizeConfig

SCHEMES = ["w4a16_asym", ".*/down=w4a16_asym;.*=w4a16_g32_asym"]


@pytest.fixture
def finished(monkeypatch):
    """Replaces quantization; the increase is 0.1 plus a hundredth per seed, and half in groups."""
    runs = []

    def quantize(config, source, workdir, **_):
        runs.append((config.name, config.scheme, config.rules, config.seed))
        increase = (0.1 + 0.01 * config.seed) * (0.5 if config.rules else 1.0)
        packed = {"nll": 1.5 + increase, "increase_se": 0.002}
        workdir.mkdir(parents=True)
        summary = {"float": {"nll": 1.5}, "packed": packed, "seconds": 3.0}
        (workdir / "summary.json").write_text(json.dumps(summary))

    monkeypatch.setattr(module, "quantize", quantize)
    monkeypatch.setattr(module, "load_source", lambda path: path)
    return runs


def test_every_row_meets_every_scheme_and_seed_once(finished, tmp_path):
    configs = {name: QuantizeConfig(name=name) for name in ("a", "b")}
    text = module.study(configs, SCHEMES, "model", tmp_path, [0, 1, 2])
    assert len(finished) == len(set(finished)) == 2 * 2 * 3
    assert ("a", SCHEMES[0], "", 1) in finished
    assert ("b", "w4a16_asym", SCHEMES[1], 2) in finished
    # Means of 0.10, 0.11, 0.12 and of half of them; standard deviations 0.01 and 0.005.
    groups = "+0.0550 ± 0.0050 (3 seeds, 3 s)"
    assert f"| a | +0.1100 ± 0.0100 (3 seeds, 3 s) | {groups} |" in text
    assert (tmp_path / "study.md").read_text() == text

    again = module.study(configs, SCHEMES, "model", tmp_path, [0, 1, 2])
    assert again == text
    assert len(finished) == 12, "what is finished does not run again"


def test_a_single_run_shows_its_error_over_the_text_and_a_missing_one_nothing(finished, tmp_path):
    module.study({"a": QuantizeConfig()}, SCHEMES[:1], "model", tmp_path)
    text = module.table(["a", "b"], SCHEMES, tmp_path, [0])
    assert "| a | +0.1000 (se 0.0020, 3 s) |  |" in text
    assert "| b |  |  |" in text
