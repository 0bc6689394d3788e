import json

import pytest

import lowbit_jax as lb


def test_the_manifest_says_what_the_checkpoint_holds(saved, packed):
    manifest = lb.checkpoint.read_manifest(saved)
    assert manifest["schema"] == lb.checkpoint.SCHEMA == 1
    assert manifest["library"] == f"lowbit_jax {lb.__version__}"
    assert (manifest["family"], manifest["kind"]) == ("decoder", "packed")
    assert manifest["config"]["ffn_dim"] == 64
    assert manifest["metadata"] == {"tokenizer": "bytes"}
    assert lb.Recipe.from_json(json.dumps(manifest["recipe"])) == lb.recipe_of(packed)
    up = manifest["tensors"]["layers/0/mlp/up/kernel"]
    spec = packed.layers[0].mlp.up.kernel[...].spec
    assert up == {
        "shape": [32, 64],
        "dtype": "float32",
        "spec": spec.to_dict(),
        "layout": "planes-k-low-first",
    }
    assert manifest["tensors"]["norm/scale"] == {"shape": [32], "dtype": "float32"}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda text: text[: len(text) // 2], "the manifest is damaged"),
        (lambda text: "", "the manifest is damaged"),
        (lambda text: "\ufffd\x00", "the manifest is damaged"),
        (lambda text: "[1]", "schema None is not 1, the one this version reads"),
        (lambda text: text.replace('"schema": 1', '"schema": 7', 1), "schema 7 is not 1"),
        (lambda text: text.replace('"kind"', '"sort"'), r"keys \['kind', 'sort'\] are missing or"),
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


def test_a_manifest_that_is_no_text_is_refused(tmp_path):
    (tmp_path / "manifest.json").write_bytes(b"\xff\xfe\x00{")
    with pytest.raises(ValueError, match="the manifest is damaged"):
        lb.checkpoint.read_manifest(tmp_path)


def test_another_folder_is_no_checkpoint(tmp_path):
    (tmp_path / "notes.txt").write_text("mine")
    for path in (tmp_path, tmp_path / "missing"):
        with pytest.raises(ValueError, match=r"no checkpoint here \(manifest.json is missing\)"):
            lb.checkpoint.load(path)
