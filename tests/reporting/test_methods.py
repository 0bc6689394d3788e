"""The table of methods names only what exists, and all of it."""

import pkgutil
from pathlib import Path

import pytest

import lowbit_jax as lb
from lowbit_jax.reporting.methods import METHODS, methods_table


@pytest.mark.parametrize("method", METHODS, ids=lambda m: m.name)
def test_what_a_method_names_exists(method):
    for name in method.use:
        if name not in lb.presets:
            assert pkgutil.resolve_name(f"lowbit_jax.{name}").__doc__
    assert bool(method.use) == (method.status != "not here yet")
    assert bool(method.note) == (method.status != "here")


def test_every_training_time_quantizer_is_in_the_table():
    used = set()
    for name in (name for method in METHODS for name in method.use):
        scheme = lb.presets.get(name)
        used |= {type(q) for q in (scheme.weight, scheme.input)} if scheme else {name}
    # Ranges that belong to no training method: plain, calibrated or found beforehand.
    plain = {"MinMax", "StaticAbsmax", "FixedRange"}
    for quantizer in lb.quantizers.ALL:
        known = quantizer in used or f"quantizers.{quantizer.__name__}" in used
        assert known or quantizer.__name__ in plain, quantizer


def test_the_table_is_markdown_with_a_line_per_method():
    lines = methods_table().splitlines()
    assert len(lines) == len(METHODS) + 2
    assert {line.count("|") for line in lines} == {5}


def test_the_documented_table_is_the_generated_one():
    written = Path(__file__).parents[2] / "docs" / "methods.md"
    assert written.read_text() == methods_table(), (
        "python -m experiments.methods --out docs/methods.md"
    )
