import io

import pytest
from rich.console import Console

from lowbit_jax.reporting.compare import compare
from lowbit_jax.reporting.report import report, result_table


def summary(**changes):
    return {
        "config": "card",
        "recipe": "w1_58a8",
        "steps": 10,
        "tokens": 1280,
        "tokens_per_step": 128,
        "params": 1000,
        "valid": {"nll": 1.5, "bits_per_byte": 2.164, "ppl": 4.48},
        "packed": {
            "valid_nll": 1.5,
            "bits_per_byte": 2.164,
            "ppl": 4.48,
            "bytes": 700,
            "bits_per_weight": 2.05,
            "forward_tokens_per_second": 5000.0,
        },
        "float_bytes": 4000,
        "forward_tokens_per_second": 6000.0,
        "step_ms_median": 20.0,
        "tokens_per_second": 6400.0,
        "corpus_sha256": "ab" * 32,
        "jax_version": "0",
        "device": "cpu",
    } | changes


def test_the_table_sets_both_models_side_by_side():
    console = Console(file=io.StringIO(), width=100)
    console.print(result_table(summary()))
    shown = console.file.getvalue()
    for cell in ("4 kB", "700 B", "2.050", "1.50000", "2.1640", "6,000", "5,000", "fake-quantized"):
        assert cell in shown


def test_a_sample_cannot_break_out_of_its_fence():
    text = report(summary(), layers="rows", sample="```\n# no heading", changed=[], command="c")
    assert "````\n```\n# no heading\n````" in text
    assert "recipe `w1_58a8`" in text


def test_comparison_is_sorted_by_size_and_tells_what_else_differs(tmp_path):
    small, big = summary(), summary(recipe="", tokens=99)
    big["packed"] = small["packed"] | {"bytes": 4000, "bits_per_weight": 32.0}
    text = compare({"float": big, "ternary": small}, tmp_path / "out")
    rows = [line for line in text.splitlines() if line.startswith("| ")][2:]
    assert [row.split(" | ")[0] for row in rows] == ["| ternary", "| float"]
    assert "The runs differ in training tokens: 1280, 99." in text
    assert (tmp_path / "out" / "compare.md").read_text() == text
    assert (tmp_path / "out" / "compare.png").read_bytes().startswith(b"\x89PNG")


def test_runs_on_different_text_are_not_compared(tmp_path):
    runs = {"a": summary(), "b": summary(corpus_sha256="cd" * 32)}
    with pytest.raises(ValueError, match=r"different text \(corpus sha256: a: abab.*; b: cdcd"):
        compare(runs, tmp_path)
    with pytest.raises(ValueError, match="no runs"):
        compare({}, tmp_path)
    assert list(tmp_path.iterdir()) == []
