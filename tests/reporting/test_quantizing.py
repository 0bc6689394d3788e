import io

import pytest
from matplotlib.figure import Figure
from rich.console import Console

from lowbit_jax.reporting.plots import plot_sqnr
from lowbit_jax.reporting.quantizing import (
    BlockProgress,
    positions_table,
    quantization_report,
)

ROWS = [
    {
        "path": f"layers/{i}/mlp/{name}",
        "scheme": "uint4 per channel",
        "bits": 4.25,
        "sqnr_db": 20.0 + i,
        "clipped": 0.0123,
        "error_before": 0.25,
        "error_after": 0.125,
        "damping": 0.01,
    }
    for i in (0, 1)
    for name in ("up", "down")
]


def summary():
    position = {"nll": 1.5, "ppl": 4.4817, "kl": 0.0}
    return {
        "config": "card",
        "method": "gptq",
        "scheme": "w4a16_asym",
        "float": position,
        "transformed": position,
        "fake_quant": {"nll": 1.75, "ppl": 5.7546, "kl": 0.2},
        "packed": {"nll": 1.75, "ppl": 5.7546, "kl": 0.2},
        "parameters": 1_000_000,
        "seconds": 3.21,
        "peak_memory_bytes": 1e9,
        "float_bytes": 4e6,
        "packed_bytes": 6e5,
        "bits_per_weight": 4.25,
        "evaluation_tokens": 1000,
        "calibration_sha256": "ab" * 32,
        "jax_version": "0",
        "device": "cpu",
    }


def shown(events, finished=0):
    console = Console(file=io.StringIO(), width=120)
    with BlockProgress(console, finished=finished) as progress:
        for event in events:
            progress(event)
    return console.file.getvalue().splitlines()


PLAN = {"kind": "plan", "blocks": 3, "layers": 6, "memory_bytes": 2e9, "seconds": 300.0}


def test_progress_has_a_line_for_each_layer_and_block():
    layer = {"kind": "layer", "block": "layers/0", "layer": "mlp/up", **ROWS[0]}
    block = {"kind": "block", "block": "layers/0", "output_error": 0.05, "seconds": 1.25}
    lines = shown([PLAN, layer, block | {"peak_memory_bytes": 3e8}], finished=1)
    assert lines[0] == "6 layers in 3 blocks; about 2 GB and 5 min, without compilation"
    assert lines[1] == "going on after 1 of 3 blocks"
    assert lines[3].split() == ["mlp/up", "0.25", "0.125", "0.01"]
    assert lines[4].split() == ["layers/0,", "output", "0.05", "1.2", "300", "MB"]


def test_what_a_block_learned_together_is_said_once():
    learned = {"kind": "layer", "objective_first": 2.0, "objective_last": 0.5}
    lines = shown([learned | {"block": "layers/0", "layer": name} for name in ("up", "down")])
    assert [line.split()[-2:] for line in lines] == [["2", "0.5"]]


def test_messages_and_progress_of_the_last_stage_are_shown():
    lines = shown(
        [
            {"kind": "message", "text": "layers/0/up: rounded to nearest"},
            {"kind": "progress", "stage": "EndToEnd", "step": 20, "steps": 200, "kl": 0.125},
        ]
    )
    assert lines == ["note: layers/0/up: rounded to nearest", "EndToEnd 20/200  KL 0.12500"]


def test_the_table_shows_where_the_loss_was_lost():
    console = Console(file=io.StringIO(), width=80)
    console.print(positions_table(summary()))
    text = console.file.getvalue()
    for cell in ("transformed, not quantized", "packed, reloaded", "+0.25000", "0.20000"):
        assert cell in text


def test_the_report_has_every_layer_and_fences_what_it_quotes():
    text = quantization_report(
        summary(),
        ROWS,
        blocks=[
            {"block": "layers/0", "output_error": 0.05, "seconds": 1.0, "peak_memory_bytes": 1e6}
        ],
        messages=["```\n# no heading"],
        layers="rows",
        changed=["gptq.order: 'none' -> 'group'"],
        sensitivity="table",
    )
    row = "| layers/1/mlp/down | 4.25 | 21.0 | 0.25 | 0.125 | 1.23% | 0.01 |  | uint4 per channel |"
    assert row in text
    assert "````\n```\n# no heading\n````" in text
    assert "## Sensitivity\n\n```\ntable" in text
    assert "gptq.order: 'none' -> 'group'" in text
    without = quantization_report(
        summary(), ROWS, blocks=[], messages=[], layers="rows", changed=[]
    )
    assert "## Sensitivity" not in without
    assert "## What to know" not in without


@pytest.mark.parametrize(("known", "panels"), [(True, 2), (False, 1)])
def test_sqnr_has_a_line_per_kind_and_a_panel_for_outputs_where_known(
    tmp_path, monkeypatch, known, panels
):
    figures, save = [], Figure.savefig

    def saving(self, *args, **kwargs):
        figures.append(self)
        save(self, *args, **kwargs)

    monkeypatch.setattr(Figure, "savefig", saving)
    dropped = () if known else ("error_after",)
    rows = [{k: v for k, v in row.items() if k not in dropped} for row in ROWS]
    plot_sqnr(rows, tmp_path / "sqnr.png", title="t")
    axes = figures[0].axes
    assert len(axes) == panels
    assert [line.get_label() for line in axes[0].lines] == ["mlp/up", "mlp/down"]
    assert list(axes[0].lines[0].get_ydata()) == [20.0, 21.0]
    if known:
        # -10 log10(1/8)
        assert axes[1].lines[0].get_ydata()[0] == pytest.approx(9.0309, abs=1e-4)
