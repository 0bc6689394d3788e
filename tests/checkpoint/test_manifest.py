import hashlib
import json

import numpy as np
import pytest

import lowbit_jax as lb
from lowbit_jax.checkpoint import manifest as manifests


def sha256(array):
    return hashlib.sha256(np.asarray(array).tobytes()).hexdigest()


def test_the_manifest_says_what_the_checkpoint_holds(saved, packed):
    manifest = lb.checkpoint.read_manifest(saved)
    assert manifest["schema"] == lb.checkpoint.SCHEMA == 2
    assert manifest["library"] == f"lowbit_jax {lb.__version__}"
    assert (manifest["family"], manifest["kind"]) == ("decoder", "packed")
    assert manifest["config"]["ffn_dim"] == 64
    assert manifest["metadata"] == {"tokenizer": "bytes"}
    assert lb.Recipe.from_json(json.dumps(manifest["recipe"])) == lb.recipe_of(packed)
    up = manifest["tensors"]["layers/0/mlp/up/kernel"]
    spec = packed.layers[0].mlp.up.kernel[...].spec
    q = packed.layers[0].mlp.up.kernel[...]
    assert up == {
        "shape": [32, 64],
        "dtype": "float32",
        "spec": spec.to_dict(),
        "layout": "planes-k-low-first",
        "sha256": {"words_0": sha256(q.words[0]), "scale": sha256(q.scale)},
    }
    norm = packed.norm.scale[...]
    assert manifest["tensors"]["norm/scale"] == {
        "shape": [32],
        "dtype": "float32",
        "sha256": sha256(norm),
    }
    assert (manifest["tokenizer"], manifest["source_sha256"]) == (None, None)


def with_entry(key, value):
    return lambda text: json.dumps(json.loads(text) | {key: value})


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda text: text[: len(text) // 2], "the manifest is damaged"),
        (lambda text: "", "the manifest is damaged"),
        (lambda text: "\ufffd\x00", "the manifest is damaged"),
        (lambda text: "[" * 100_000, "the manifest is damaged"),
        (lambda text: '{"schema": ' + "1" * 10_000 + "}", "the manifest is damaged"),
        (lambda text: "[1]", r"schema None is not among \[1, 2\], those that this version reads"),
        (lambda text: text.replace('"schema": 2', '"schema": 7', 1), "schema 7 is not among"),
        (lambda text: text.replace('"schema": 2', '"schema": true', 1), "schema True is not among"),
        (lambda text: text.replace('"kind"', '"sort"'), r"keys \['kind', 'sort'\] are missing or"),
        (lambda text: text.replace('"packed"', '"squashed"'), r"\(kind is 'squashed'\)"),
        (lambda text: text.replace('"arrays"', '"../other"'), r"\['../other', 'arrays'\]"),
        (with_entry("arrays", "../other"), r"\(arrays is '../other'\)"),
        (with_entry("arrays", "/etc"), r"\(arrays is '/etc'\)"),
        (with_entry("arrays", ["arrays"]), r"\(arrays is \['arrays'\]\)"),
        (with_entry("tensors", []), r"\(tensors is \[\]\)"),
        (with_entry("metadata", None), r"\(metadata is None\)"),
        (with_entry("family", None), r"\(config is \{"),
        (with_entry("recipe", "w4a16"), r"\(recipe is 'w4a16'\)"),
        (
            lambda text: text.replace("planes-k-low-first", "planes-n"),
            "kernel has the layout 'planes-n'; 'planes-k-low-first' is the one",
        ),
        (
            lambda text: text.replace('"sha256": "', '"sha256": "x'),
            r"damaged \(tensor embed/embedding: ",
        ),
        (lambda text: text.replace('"dtype"', '"type"'), r"the manifest is damaged \(tensor embed"),
    ],
)
def test_a_damaged_or_unknown_manifest_is_refused(saved, tmp_path, change, message):
    text = (saved / "manifest.json").read_text()
    (tmp_path / "manifest.json").write_text(change(text))
    with pytest.raises(ValueError, match=message) as caught:
        lb.checkpoint.read_manifest(tmp_path)
    assert str(tmp_path) in str(caught.value)
    with pytest.raises(ValueError, match=message):
        lb.checkpoint.load(tmp_path)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"shape": [-1]}, r"norm/scale: the manifest describes no array \(shape \[-1\]\)"),
        ({"shape": 3}, "norm/scale: the manifest describes no array"),
        ({"shape": [10**30]}, "norm/scale"),
        ({"dtype": "float33"}, "norm/scale: the manifest describes no array .*float33"),
        ({"dtype": "key<x>"}, r"norm/scale: .*\(no generator of random keys has the dtype"),
    ],
)
def test_a_tensor_that_is_none_is_refused_by_name(saved, tmp_path, change, message):
    manifest = json.loads((saved / "manifest.json").read_text())
    manifest["tensors"]["norm/scale"] |= change
    (tmp_path / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(ValueError, match=message):
        lb.checkpoint.load(tmp_path)


def test_a_manifest_without_end_is_not_read(saved, tmp_path, monkeypatch):
    monkeypatch.setattr(manifests, "_MOST_BYTES", 100)
    with pytest.raises(ValueError, match=r"damaged \(\d+ bytes, where 100 are the most\)"):
        lb.checkpoint.read_manifest(saved)


def test_a_manifest_that_is_no_text_is_refused(tmp_path):
    (tmp_path / "manifest.json").write_bytes(b"\xff\xfe\x00{")
    with pytest.raises(ValueError, match="the manifest is damaged"):
        lb.checkpoint.read_manifest(tmp_path)


def test_another_folder_is_no_checkpoint(tmp_path):
    (tmp_path / "notes.txt").write_text("mine")
    for path in (tmp_path, tmp_path / "missing"):
        with pytest.raises(ValueError, match=r"no checkpoint here \(manifest.json is missing\)"):
            lb.checkpoint.load(path)
