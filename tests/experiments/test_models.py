import pytest
from flax import nnx

import lowbit_jax as lb
from experiments.models import load_source
from lowbit_jax.data import ByteTokenizer
from lowbit_jax.models import Decoder, DecoderConfig

CONFIG = DecoderConfig(vocab=256, dim=8, layers=1, heads=2, kv_heads=1, ffn_dim=8, max_length=16)


@pytest.mark.parametrize("place", ["packed", "."])
def test_a_run_and_a_bare_checkpoint_bring_tokenizer_and_length(tmp_path, place):
    metadata = {"tokenizer": ByteTokenizer().to_json(), "length": 12}
    folder = tmp_path / "run"
    lb.checkpoint.save(folder / place, Decoder(CONFIG, rngs=nnx.Rngs(0)), metadata=metadata)
    source = load_source(folder)
    assert source.tokenizer == ByteTokenizer()
    assert source.length == 12
    assert source.model.config == CONFIG
    assert source.origin == {"path": str(folder), "format": "lowbit_jax"}


def test_a_missing_float_run_says_how_to_make_it(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(
        ValueError, match=r"experiments\.train --config float\.py; or give --config"
    ):
        load_source("runs/float")
    with pytest.raises(ValueError, match=r"--config float\.py:smoke"):
        load_source("runs/float_smoke")
    with pytest.raises(ValueError, match=r"gone\.gguf: there is no such file or folder; give"):
        load_source("gone.gguf")


def test_a_run_that_is_not_finished_says_so(tmp_path):
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(ValueError, match="not finished"):
        load_source(tmp_path)


def test_a_file_that_is_no_model_is_named(tmp_path):
    (tmp_path / "notes.txt").write_text("no model")
    with pytest.raises(ValueError, match=r"notes\.txt"):
        load_source(tmp_path / "notes.txt")


def test_a_gguf_file_brings_its_tokenizer(assets):
    source = load_source(assets / "stories260k" / "stories260K.gguf")
    assert source.tokenizer.bos is not None
    assert source.model.config.layers == 5
    assert source.length == 0
