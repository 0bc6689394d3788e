"""The sweep over all methods of weights."""

import json

import pytest

import lowbit_jax as lb
from experiments import zoo
from lowbit_jax.reporting.plots import pareto
from lowbit_jax.training.validation import validate


def test_every_method_of_the_zoo_is_a_valid_config_of_weights_only_and_fits_the_model():
    rows = zoo.configs([], steps=2000, lr=8e-3, seed=0)
    assert next(iter(rows)) == "float"
    assert len(rows) == len(zoo.METHODS)
    for name, config in rows.items():
        validate(config)
        if name != "float":
            scheme = lb.presets[config.recipe]
            assert scheme.weight is not None
            assert scheme.input is None
            assert scheme.output is None
            # A group that does not divide a width would stop the sweep in its middle.
            for k in (config.model.dim, config.model.ffn_dim):
                scheme.weight.spec.scale_shape((k, 64))


def test_an_unknown_method_is_named():
    with pytest.raises(ValueError, match="w9a16"):
        zoo.configs(["w9a16"], steps=1, lr=1e-3, seed=0)


def test_the_table_names_the_best_of_each_width_and_what_nothing_beats(tmp_path):
    figures = {"float": (32.0, 2.0), "w1a16": (1.01, 2.6), "w1a16_bc": (1.0, 2.7)}
    figures |= {"w2a16": (2.5, 2.8), "w4a16": (4.5, 2.1)}
    for name, (bits, loss) in figures.items():
        (tmp_path / name).mkdir()
        summary = {
            "packed": {"bits_per_weight": bits, "bits_per_byte": loss},
            "valid": {"bits_per_byte": loss},
            "tokens": 1_000_000,
        }
        (tmp_path / name / "summary.json").write_text(json.dumps(summary))
    text = zoo.write(zoo.configs([], steps=1, lr=1e-3, seed=0), tmp_path)
    assert "- up to 1: `w1a16`, 1.01 bits, 2.6000 bits/byte (of 2)" in text
    assert "| w2a16 | 2.50 | 2.8000 | 2.8000 |  |" in text  # w1a16 beats it in both
    assert "| w4a16 | 4.50 | 2.1000 | 2.1000 | yes |" in text
    assert (tmp_path / "zoo.png").stat().st_size > 1000
    points = [{"name": n, "bits": b, "bits_per_byte": v} for n, (b, v) in figures.items()]
    assert [p["name"] for p in pareto(points)] == ["w1a16_bc", "w1a16", "w4a16", "float"]
