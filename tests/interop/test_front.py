"""What cannot be loaded is said to be so."""

import pytest

from lowbit_jax import interop


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
