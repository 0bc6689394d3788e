"""What cannot be loaded is said to be so."""

import pytest
import tokenizers
from flax import nnx

from lowbit_jax import interop
from lowbit_jax.data import ByteTokenizer
from lowbit_jax.models import Decoder, DecoderConfig


def test_nothing_at_a_path(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"nowhere: nothing is there; .* a GGUF file"):
        interop.load_model(tmp_path / "nowhere")


@pytest.mark.parametrize("content", [b"", b"hello", b"\x89PNG\r\n"])
def test_another_file(save, content):
    with pytest.raises(ValueError, match=r"and is not a GGUF file, a Hugging Face folder"):
        interop.load_model(save(content, "file.bin"))


def test_a_shard_asks_for_its_folder(save):
    with pytest.raises(ValueError, match=r"Pass the folder that it lies in"):
        interop.load_model(save(b"\x02\0\0\0\0\0\0\0{}", "model.safetensors"))


def test_a_folder_of_something_else(tmp_path):
    with pytest.raises(ValueError, match=r"a folder without config.json"):
        interop.load_model(tmp_path)
    (tmp_path / "manifest.json").write_text("{}")
    with pytest.raises(ValueError, match=r"checkpoint of lowbit_jax; .*checkpoint.load"):
        interop.load_model(tmp_path)


def test_a_tokenizer_of_another_vocabulary(tmp_path):
    config = DecoderConfig(vocab=256, dim=8, layers=1, heads=1, kv_heads=1, ffn_dim=8, max_length=4)
    model, folder = Decoder(config, rngs=nnx.Rngs(0)), tmp_path / "out"
    interop.export_model(model, folder, "safetensors", tokenizer=ByteTokenizer())
    file = folder / "tokenizer.json"
    engine = tokenizers.Tokenizer.from_file(str(file))
    engine.add_special_tokens(["<image>"])
    engine.save(str(file))
    with pytest.warns(UserWarning, match=r"no rows for the added tokens .* from 256 to 256\."):
        assert interop.load_model(folder).tokenizer.vocab == 257
    words = {f"word{i}": i for i in range(300)}
    engine = tokenizers.Tokenizer(tokenizers.models.WordLevel(words, unk_token="word0"))
    engine.save(str(file))
    with pytest.raises(ValueError, match=r"has 300 tokens, and the embedding only 256 rows"):
        interop.load_model(folder)
