import json
import os
import signal

import jax
import numpy as np
import pytest
from flax import nnx

import lowbit_jax as lb
from lowbit_jax.ptq.job import Source, quantize, run
from lowbit_jax.training.errors import Interrupted
from lowbit_jax.training.runs import load_checkpoint
from lowbit_jax.training.scoring import score

LAYERS = ("query", "key", "value", "out", "gate", "up", "down")


class Killed(Exception):
    """Stands for a SIGKILL."""


def test_a_run_leaves_everything_and_packs_what_it_measured(tmp_path, tiny, tiny_source, quiet):
    summary = quantize(tiny, tiny_source, tmp_path / "run", console=quiet)
    names = {path.name for path in (tmp_path / "run").iterdir()}
    assert names == {
        *("config.json", "layers.json", "packed", "plots", "ptq", "report.md", "summary.json")
    }
    assert json.loads((tmp_path / "run" / "summary.json").read_text()) == summary
    # The same float32 arithmetic on the same values, in programs that may order sums differently.
    assert abs(summary["packed"]["nll"] - summary["fake_quant"]["nll"]) < 1e-4
    assert summary["transformed"] == summary["float"]
    assert 0 < summary["kl_per_token"] == summary["packed"]["kl"]
    assert (summary["config"], summary["method"]) == ("tiny", "rtn")
    assert summary["calibration_tokens"] == 16 * 16
    # Codes of 4 bits padded to 32 rows, and a float32 scale and zero point per output.
    assert 4 < summary["bits_per_weight"] < 8
    assert summary["packed_array_bytes"] < summary["float_bytes"]

    report = (tmp_path / "run" / "report.md").read_text()
    parts = {name: "mlp" if name in ("gate", "up", "down") else "attention" for name in LAYERS}
    for block in (0, 1):
        for name in LAYERS:
            assert f"| layers/{block}/{parts[name]}/{name} |" in report
    assert (tmp_path / "run" / "plots" / "sqnr.png").read_bytes().startswith(b"\x89PNG")
    shown = quiet.file.getvalue()
    assert "layers/1, output" in shown
    assert "14 layers in 2 blocks" in shown

    loaded = load_checkpoint(tmp_path / "run")
    kinds = {path: type(m).__name__ for path, m in lb.quantized_layers(loaded.model)}
    assert len(kinds) == 14
    assert set(kinds.values()) == {"PackedLinear"}
    # No begin token: the windows are those of experiments.evaluate.
    again = score(loaded, source=tiny.evaluation.source, length=16)
    assert np.isfinite(again.nll)


def test_a_killed_run_goes_on_at_its_block_and_ends_the_same(
    tmp_path, tiny, tiny_source, quiet, monkeypatch
):
    whole = quantize(tiny, tiny_source, tmp_path / "whole", console=quiet)
    shown = run.BlockProgress.__call__

    def killing(self, event):
        shown(self, event)
        if event["kind"] == "layer" and event["block"] == "layers/1":
            raise Killed

    monkeypatch.setattr(run.BlockProgress, "__call__", killing)
    with pytest.raises(Killed):
        quantize(tiny, tiny_source, tmp_path / "killed", console=quiet)
    with pytest.raises(ValueError, match=r"unfinished run of another config.*\n  seed: 0 -> 1"):
        quantize(tiny.replace({"seed": 1}), tiny_source, tmp_path / "killed", console=quiet)
    monkeypatch.setattr(run.BlockProgress, "__call__", shown)
    resumed = quantize(tiny, tiny_source, tmp_path / "killed", console=quiet)
    assert "going on after 1 of 2 blocks" in quiet.file.getvalue()
    for position in ("float", "transformed", "fake_quant", "packed"):
        assert resumed[position] == whole[position]
    rows = [json.loads((tmp_path / n / "layers.json").read_text()) for n in ("whole", "killed")]
    assert rows[0] == rows[1]


def test_a_finished_run_is_kept(tmp_path, tiny, tiny_source, quiet):
    quantize(tiny, tiny_source, tmp_path / "run", console=quiet)
    before = (tmp_path / "run" / "summary.json").read_text()
    with pytest.raises(ValueError, match=r"this run is finished .* --overwrite"):
        quantize(tiny, tiny_source, tmp_path / "run", console=quiet)
    assert (tmp_path / "run" / "summary.json").read_text() == before
    quantize(tiny, tiny_source, tmp_path / "run", overwrite=True, console=quiet)
    assert (tmp_path / "run.1" / "summary.json").read_text() == before


def test_transforms_are_measured_before_anything_is_rounded(tmp_path, tiny, tiny_source, quiet):
    config = tiny.replace({"pipeline": "smoothquant,rtn", "scheme": "w8a8", "sensitivity": True})
    summary = quantize(config, tiny_source, tmp_path / "run", console=quiet)
    # SmoothQuant keeps the function to float32 rounding; W8A8 moves it by far more.
    assert abs(summary["transformed"]["nll"] - summary["float"]["nll"]) < 1e-5
    assert summary["transformed"]["kl"] < summary["packed"]["kl"] / 10
    assert summary["method"] == "smoothquant + rtn"
    assert len(summary["sensitivity"]) == 14
    assert "## Sensitivity" in (tmp_path / "run" / "report.md").read_text()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"scheme": "w5a16"}, "no preset is named 'w5a16'"),
        ({"scheme": "w4a16_g64"}, r"layers/0/attention/.*: .*32"),
        ({"rules": ".*/dwn=w4a16"}, r"the rule '\.\*/dwn' matches no layer"),
        ({"include": "head,hed"}, "include='hed': no layer"),
        ({"blocks": r"blocks/\d+"}, "matches no module"),
        (
            {"calibration.sequences": 0, "calibration.batch": 0},
            r"sequences=0 is below 1; .*batch=0",
        ),
        ({"calibration.sequences": 10_000}, r"60 documents give .* take 160,000"),
        ({"rtn.range": "random"}, "range='random'"),
    ],
)
def test_what_is_wrong_is_refused_before_anything_is_written(
    tmp_path, tiny, tiny_source, quiet, changes, message
):
    with pytest.raises(ValueError, match=message):
        quantize(tiny.replace(changes), tiny_source, tmp_path / "run", console=quiet)
    assert not (tmp_path / "run").exists()


def test_a_quantized_model_is_refused(tmp_path, tiny, tiny_source, quiet):
    packed = lb.pack_model(lb.quantize_model(tiny_source.model, "w8a16"))
    with pytest.raises(ValueError, match="quantized already"):
        quantize(tiny, Source(packed, tiny_source.tokenizer), tmp_path / "run", console=quiet)


def test_the_float_model_is_left_as_it_was(tmp_path, tiny, tiny_source, quiet):
    before = [np.array(x) for x in jax.tree.leaves(nnx.state(tiny_source.model))]
    quantize(tiny.replace({"pipeline": "smoothquant,rtn"}), tiny_source, tmp_path, console=quiet)
    after = jax.tree.leaves(nnx.state(tiny_source.model))
    for x, y in zip(before, after, strict=True):
        np.testing.assert_array_equal(x, y)


def test_sigterm_leaves_what_is_finished_and_says_so(
    tmp_path, tiny, tiny_source, quiet, monkeypatch
):
    shown = run.BlockProgress.__call__

    def signalling(self, event):
        shown(self, event)
        if event["kind"] == "block" and event["block"] == "layers/0":
            os.kill(os.getpid(), signal.SIGTERM)

    with monkeypatch.context() as patch:
        patch.setattr(run.BlockProgress, "__call__", signalling)
        with pytest.raises(Interrupted, match=r"SIGTERM \(layers/1, .* Run the same") as stop:
            quantize(tiny, tiny_source, tmp_path / "run", console=quiet)
    assert stop.value.exit_code == 128 + signal.SIGTERM
    summary = quantize(tiny, tiny_source, tmp_path / "run", console=quiet)
    assert "going on after 1 of 2 blocks" in quiet.file.getvalue()
    assert summary["packed"]["nll"] > 0
