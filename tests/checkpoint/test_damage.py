"""Files that are not what was saved are refused by one message, which names them."""

import json
import shutil

import jax
import numpy as np
import pytest
from flax import nnx

import lowbit_jax as lb
from lowbit_jax.data import ByteTokenizer, SubwordTokenizer


@pytest.fixture
def copied(saved, tmp_path):
    shutil.copytree(saved, tmp_path / "copy")
    return tmp_path / "copy"


def array_file(path, name):
    """The only chunk of an array."""
    (chunk,) = (p for p in (path / "arrays" / name).iterdir() if p.name[0].isdecimal())
    return chunk


WORDS = "layers.0.mlp.up.kernel.words_0"


@pytest.mark.parametrize(
    "cut", [lambda raw: raw[: len(raw) // 2], lambda raw: b"", lambda raw: raw + b"\0"]
)
def test_an_array_of_the_wrong_length_is_named(copied, cut):
    file = array_file(copied, WORDS)
    file.write_bytes(cut(file.read_bytes()))
    with pytest.raises(ValueError, match=rf"{WORDS}: the arrays cannot be read .* damaged") as got:
        lb.checkpoint.load(copied)
    assert str(copied) in str(got.value)
    assert "\n" not in str(got.value)


@pytest.mark.parametrize("what", ["arrays", f"arrays/{WORDS}", f"arrays/{WORDS}/.zarray"])
def test_missing_files_are_named(copied, what):
    gone = copied / what
    shutil.rmtree(gone) if gone.is_dir() else gone.unlink()
    with pytest.raises(ValueError, match="the arrays cannot be read"):
        lb.checkpoint.load(copied)


def test_a_missing_chunk_is_not_taken_for_zeros(copied):
    array_file(copied, WORDS).unlink()
    with pytest.raises(ValueError, match=rf"{WORDS}: the arrays cannot be read"):
        lb.checkpoint.load(copied)


@pytest.mark.parametrize(
    "change",
    [{"shape": [2**20, 2**20]}, {"dtype": "<f4"}, {"chunks": [2**20, 2**20]}, {"shape": "wide"}],
)
def test_headers_of_arrays_that_lie_are_refused(copied, change):
    header = copied / "arrays" / WORDS / ".zarray"
    header.write_text(json.dumps(json.loads(header.read_text()) | change))
    with pytest.raises(ValueError, match=rf"{WORDS}: the arrays cannot be read"):
        lb.checkpoint.load(copied)


def test_a_flipped_bit_is_found_by_its_digest(copied):
    file = array_file(copied, WORDS)
    content = bytearray(file.read_bytes())
    content[len(content) // 3] ^= 4
    file.write_bytes(content)
    lb.checkpoint.load(copied)  # every pattern of bits is a number: only a digest can tell
    with pytest.raises(ValueError, match=r"1 arrays is not .*: layers/0/mlp/up/kernel/words_0\."):
        lb.checkpoint.load(copied, verify=True)


def test_exchanged_files_are_found_by_their_digests(copied):
    up, gate = (
        copied / "arrays" / f"layers.0.mlp.{name}.kernel.words_0" for name in ("up", "gate")
    )
    up.rename(copied / "x")
    gate.rename(up)
    (copied / "x").rename(gate)
    with pytest.raises(ValueError, match=r"2 arrays .*gate/kernel/words_0, .*up/kernel/words_0\."):
        lb.checkpoint.load(copied, verify=True)


def test_digests_pass_for_what_was_saved(saved, packed):
    loaded = lb.checkpoint.load(saved, verify=True)
    assert lb.checkpoint.digest(loaded) == lb.checkpoint.digest(packed)


def test_a_digest_is_of_all_arrays_and_their_places(model):
    base = lb.checkpoint.digest(model)
    assert base == lb.checkpoint.digest(nnx.clone(model))
    changed = nnx.clone(model)
    bias = np.asarray(changed.norm.scale[...]).copy()
    bias[0] = np.nextafter(bias[0], 2)
    changed.norm.scale.set_value(jax.device_put(bias))
    swapped = nnx.clone(model)
    layer = swapped.layers[0]
    gate, up = layer.mlp.gate.kernel[...], layer.mlp.up.kernel[...]
    layer.mlp.gate.kernel.set_value(up)
    layer.mlp.up.kernel.set_value(gate)
    assert len({base, lb.checkpoint.digest(changed), lb.checkpoint.digest(swapped)}) == 3


def edit(path, **changes):
    manifest = json.loads((path / "manifest.json").read_text())
    (path / "manifest.json").write_text(json.dumps(manifest | changes))


def test_a_tokenizer_that_has_more_tokens_than_the_model_is_refused(model, copied, tmp_path):
    tokenizer = ByteTokenizer().to_json()
    with pytest.raises(
        ValueError, match="tokenizer has 256 tokens and the model embeddings for 24"
    ):
        lb.checkpoint.save(tmp_path / "c", model, tokenizer=tokenizer)
    assert not (tmp_path / "c").exists()
    edit(copied, tokenizer=tokenizer)
    with pytest.raises(ValueError, match=f"{copied}: the tokenizer has 256 tokens"):
        lb.checkpoint.load(copied)
    edit(copied, tokenizer=None, metadata={"tokenizer": tokenizer})  # where schema 1 had it
    with pytest.raises(ValueError, match="the tokenizer has 256 tokens"):
        lb.checkpoint.load(copied)
    edit(copied, metadata={}, tokenizer={"type": "tokenizers", "definition": "{}"})
    with pytest.raises(ValueError, match=f"{copied}: the tokenizer cannot be read"):
        lb.checkpoint.load(copied)


def test_a_tokenizer_comes_back(model, tmp_path):
    definition = json.dumps(
        {
            "version": "1.0",
            "added_tokens": [],
            "model": {"type": "BPE", "vocab": {"a": 0, "b": 1}, "merges": []},
        }
    )
    tokenizer = SubwordTokenizer(definition).to_json()
    digest = "0" * 64
    lb.checkpoint.save(
        tmp_path / "c", model, tokenizer=tokenizer, source_sha256=digest, calibration_sha256=digest
    )
    manifest = lb.checkpoint.read_manifest(tmp_path / "c")
    assert manifest["tokenizer"] == tokenizer
    assert (manifest["source_sha256"], manifest["calibration_sha256"]) == (digest, digest)
    lb.checkpoint.load(tmp_path / "c")


def test_what_is_no_digest_is_refused_while_saving(model, tmp_path):
    with pytest.raises(ValueError, match="source_sha256 'abc' is no SHA-256"):
        lb.checkpoint.save(tmp_path / "c", model, source_sha256="abc")
    assert not list(tmp_path.iterdir())
