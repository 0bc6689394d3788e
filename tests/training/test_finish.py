"""The end of a run, and what its folder is good for; two tiny runs serve all tests."""

import json

import jax
import numpy as np
import pytest
from flax import nnx

import lowbit_jax as lb
from lowbit_jax.training import build, loop
from lowbit_jax.training.runs import find_checkpoint, load_checkpoint, read_summary
from lowbit_jax.training.scoring import score

# The list of the README's "what a run leaves".
FIELDS = {
    "config",
    "steps",
    "params",
    "valid",
    "packed",
    "float_bytes",
    "step_ms_median",
    "tokens_per_second",
    "corpus_sha256",
    "jax_version",
    "device",
}


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """`runs(config, console)`: the folder of a finished run, trained once per recipe."""
    done = {}

    def run(config, console, recipe):
        if recipe not in done:
            folder = tmp_path_factory.mktemp("runs") / (recipe or "float")
            done[recipe] = loop.train(config.replace({"recipe": recipe}), folder, console=console)
            done[recipe]["folder"] = folder
        return done[recipe]

    return run


@pytest.mark.parametrize("recipe", [pytest.param("", marks=pytest.mark.slow), "w1_58a8"])
def test_a_run_leaves_everything_that_is_promised(runs, tiny, quiet, recipe):
    result = runs(tiny, quiet, recipe)
    folder = result["folder"]
    for name in ("config.json", "metrics.jsonl", "checkpoints", "packed", "report.md"):
        assert (folder / name).exists()
    for name in ("loss.png", "weights.png"):
        assert (folder / "plots" / name).read_bytes().startswith(b"\x89PNG")
    summary = read_summary(folder)
    assert set(summary) >= FIELDS
    assert {"nll", "bits_per_byte", "ppl"} <= set(summary["valid"])
    packed = folder / "packed"
    assert summary["packed"]["bytes"] == sum(
        p.stat().st_size for p in packed.rglob("*") if p.is_file()
    )
    assert summary["float_bytes"] == 4 * summary["params"]
    # 256 * 32 in and out, 2 * 32 * 32 + 2 * 32 * 16 in attention, 3 * 32 * 32 in the MLP, 3 norms.
    assert summary["params"] == 2 * 256 * 32 + 3 * 1024 + 3 * 1024 + 3 * 32
    assert "low " in (folder / "report.md").read_text()


def test_the_packed_model_predicts_what_training_saw(runs, tiny, quiet):
    summary = runs(tiny, quiet, "w1_58a8")
    assert abs(summary["packed"]["valid_nll"] - summary["valid"]["nll"]) < 1e-4
    # 7 matrices of 32 inputs: 2 bits, and one float32 scale each.
    weights, matrices = 6 * 1024, 7
    assert summary["packed"]["bits_per_weight"] == pytest.approx(2 + 32 * matrices / weights)
    layers = dict(lb.quantized_layers(load_checkpoint(summary["folder"]).model))
    assert len(layers) == matrices
    assert all(isinstance(layer.kernel, lb.Packed) for layer in layers.values())


def test_a_float_run_is_its_own_packed_model(runs, tiny, quiet):
    summary = runs(tiny, quiet, "")
    assert summary["packed"]["valid_nll"] == summary["valid"]["nll"]
    assert summary["packed"]["bits_per_weight"] == 32.0


def test_a_run_that_died_after_its_last_step_only_finishes(runs, tiny, quiet, tmp_path):
    first = loop.train(tiny, tmp_path / "run", console=quiet)
    (tmp_path / "run" / "summary.json").unlink()
    again = loop.train(tiny, tmp_path / "run", console=quiet)
    assert (again["valid"], again["step_ms_median"]) == (first["valid"], first["step_ms_median"])
    with pytest.raises(ValueError, match="this run is finished"):
        loop.train(tiny, tmp_path / "run", console=quiet)


def test_scores_compare_with_the_summary_and_any_text_can_be_read(runs, tiny, quiet, tmp_path):
    summary = runs(tiny, quiet, "w1_58a8")
    loaded = load_checkpoint(summary["folder"])
    own = score(loaded, batch=tiny.batch, max_windows=tiny.final_batches * tiny.batch)
    assert own.length == tiny.length
    assert own.source == tiny.data.source
    (tmp_path / "a.txt").write_text("low bit")
    (tmp_path / "b.txt").write_text("scale")
    text = score(loaded, source=f"text:{tmp_path}/*.txt", length=8, batch=2)
    # "low bit" + separator + "scale": 14 bytes, of which the first is not predicted.
    assert (text.tokens, text.length) == (13, 8)
    assert text.bits_per_byte == pytest.approx(text.nll / np.log(2))
    json.dumps(text.to_dict())
    with pytest.raises(FileNotFoundError, match="matches no file"):
        score(loaded, source=f"text:{tmp_path}/*.md")
    with pytest.raises(ValueError, match="longer than"):
        score(loaded, length=64)


def test_a_float_run_starts_and_teaches_a_quantized_one(runs, tiny, quiet):
    folder = runs(tiny, quiet, "")["folder"]
    trained = nnx.state(load_checkpoint(folder).model, nnx.Param)
    config = tiny.replace({"recipe": "w4a16_g32_lsq", "init_from": str(folder)})
    model = build.build_model(config, vocab=256)
    start = dict(nnx.to_flat_state(nnx.state(model, nnx.Param)))
    for path, leaf in nnx.to_flat_state(trained):
        np.testing.assert_array_equal(start[path][...], leaf[...])
    # Learned scales start from the loaded weights: other weights, other scales.
    other = build.build_model(tiny.replace({"recipe": "w4a16_g32_lsq"}), vocab=256)
    scale = ("layers", 0, "mlp", "up", "kernel_scale")
    assert np.any(start[scale][...] != dict(nnx.to_flat_state(nnx.state(other)))[scale][...])
    teacher = build.load_teacher(tiny.replace({"distill.teacher": str(folder)}), vocab=256)
    assert len(jax.tree.leaves(teacher.state)) == len(jax.tree.leaves(trained))


def test_checkpoints_that_do_not_fit_are_refused_with_the_reason(runs, tiny, quiet, tmp_path):
    folder = str(runs(tiny, quiet, "")["folder"])
    with pytest.raises(
        ValueError, match=r"parameters do not fit .*\(256, 32\) there, \(256, 64\) here"
    ):
        build.build_model(tiny.replace({"init_from": folder, "model.dim": 64}), vocab=256)
    with pytest.raises(
        ValueError, match=r"vocabulary 256, context 32; this run needs vocabulary 99"
    ):
        build.load_teacher(tiny.replace({"distill.teacher": folder}), vocab=99)
    packed = str(runs(tiny, quiet, "w1_58a8")["folder"])
    with pytest.raises(ValueError, match=r"init_from=.*: holds a quantized model \(7 layers"):
        build.build_model(tiny.replace({"init_from": packed}), vocab=256)
    with pytest.raises(ValueError, match="there is no such folder"):
        find_checkpoint(tmp_path / "nowhere")
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(ValueError, match="is not finished"):
        find_checkpoint(tmp_path)
    with pytest.raises(ValueError, match="is not finished: it has no summary"):
        read_summary(tmp_path)
