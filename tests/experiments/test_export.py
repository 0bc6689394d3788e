"""The commands `export` and `import` as a user starts them."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
from flax import nnx

import lowbit_jax as lb
from lowbit_jax.data.tokenizers import ByteTokenizer
from lowbit_jax.models import Decoder, DecoderConfig
from lowbit_jax.recipe import Recipe, Rule
from lowbit_jax.surgery import pack_model, quantize_model

CONFIG = DecoderConfig(
    vocab=256, dim=32, layers=1, heads=1, kv_heads=1, ffn_dim=32, max_length=16, norm_eps=2.0**-20
)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    path = tmp_path_factory.mktemp("export") / "packed"
    model = Decoder(CONFIG, rngs=nnx.Rngs(0))
    recipe = Recipe(Rule(r"layers/\d+/(attention|mlp)/\w+", lb.presets["w8a16_g32"]))
    model = pack_model(quantize_model(model, recipe))
    lb.checkpoint.save(path, model, metadata={"tokenizer": ByteTokenizer().to_json()})
    return path


def command(folder, module, *arguments):
    environment = dict(os.environ, XLA_FLAGS="", JAX_PLATFORMS="cpu")
    environment["PYTHONPATH"] = str(Path(__file__).parents[2])
    return subprocess.run(
        [sys.executable, "-m", f"experiments.{module}", *map(str, arguments)],
        cwd=folder,
        env=environment,
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )


@pytest.mark.slow
def test_out_and_in_again_keeps_the_codes(checkpoint, tmp_path):
    out = ("--checkpoint", checkpoint, "--format", "gguf", "--out", "model.gguf", "--strict")
    done = command(tmp_path, "export", *out)
    assert done.returncode == 0, done.stderr
    assert "Q8_0 codes" in done.stdout
    done = command(tmp_path, "import", "--model", "model.gguf", "--out", "again")
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == "again: llama, 7 layers with their codes"
    first, second = (lb.checkpoint.load(path) for path in (checkpoint, tmp_path / "again"))
    for name in ("gate", "up", "down"):
        a, b = (getattr(m.layers[0].mlp, name).freeze_kernel() for m in (first, second))
        assert (a.codes() == b.codes()).all()


def test_a_wrong_command_leaves_with_one_message(checkpoint, tmp_path):
    done = command(
        tmp_path, "export", "--checkpoint", checkpoint, "--format", "bitnet", "--out", "out"
    )
    assert done.returncode == 1
    assert "BitNet cannot hold int8 in groups of 32" in done.stderr
    assert "Traceback" not in done.stderr
    assert not list(tmp_path.iterdir())
