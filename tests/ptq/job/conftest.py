"""A tiny decoder over bytes, with and without a begin token, and a text for it."""

import io
import random
from typing import override

import numpy as np
import pytest
from flax import nnx
from rich.console import Console

from lowbit_jax.data import ByteTokenizer, Tokenizer
from lowbit_jax.models import Decoder, DecoderConfig
from lowbit_jax.ptq.job import QuantizeConfig, Source

SEPARATOR = "<|endoftext|>"


class BytesWithBegin(Tokenizer):
    """Bytes, and 256 as the begin of a text."""

    vocab = 257
    bos = 256

    @override
    def encode_batch(self, texts):
        return ByteTokenizer().encode_batch(texts)

    @override
    def decode(self, tokens):
        return ByteTokenizer().decode(np.asarray([t for t in tokens if t != self.bos]))

    @override
    def byte_count(self, tokens):
        return int(np.sum(np.asarray(tokens) != self.bos))

    @override
    def to_json(self):
        return {"type": "bytes"}


@pytest.fixture
def begin():
    return BytesWithBegin()


@pytest.fixture(scope="session")
def tiny_source():
    # All kernels of one shape, so that every program is compiled once.
    config = DecoderConfig(
        vocab=256, dim=32, layers=2, heads=2, kv_heads=2, ffn_dim=32, max_length=32
    )
    return Source(Decoder(config, rngs=nnx.Rngs(0)), ByteTokenizer(), length=16)


@pytest.fixture(scope="session")
def stories(tmp_path_factory):
    words = ["low", "bit", "scale", "code", "word", "float", "grid"]
    draw = random.Random(0)
    documents = [" ".join(draw.choices(words, k=draw.randint(3, 30))) for _ in range(60)]
    path = tmp_path_factory.mktemp("text") / "stories.txt"
    path.write_text(f"\n{SEPARATOR}\n".join(documents))
    return path


@pytest.fixture
def tiny(stories):
    """16 sequences of 16 tokens, and the solver that compiles fastest."""
    return QuantizeConfig(name="tiny", pipeline="rtn").replace(
        {
            "calibration.source": f"text:{stories}",
            "calibration.separator": SEPARATOR,
            "calibration.sequences": 16,
            "evaluation.source": f"text:{stories}",
            "evaluation.sequences": 20,
        }
    )


@pytest.fixture
def quiet():
    """A console that is no terminal; `quiet.file.getvalue()` is what it shows."""
    return Console(file=io.StringIO(), width=120)
