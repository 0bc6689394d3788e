import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import lowbit_jax as lb


def tiny(**changes):
    sizes = {
        "vocab": 24,
        "dim": 32,
        "layers": 1,
        "heads": 2,
        "kv_heads": 1,
        "ffn_dim": 64,
        "max_length": 8,
    }
    config = lb.models.DecoderConfig(**{**sizes, **changes})
    return nnx.jit(lambda: lb.models.Decoder(config, rngs=nnx.Rngs(0)))()


@pytest.fixture(scope="session")
def model():
    return tiny()


@pytest.fixture(scope="session")
def packed(model):
    return nnx.jit(lambda m: lb.pack_model(lb.quantize_model(m, "w1_58a8")))(model)


@pytest.fixture(scope="session")
def saved(packed, tmp_path_factory):
    """A packed checkpoint that no test changes."""
    path = tmp_path_factory.mktemp("saved") / "packed"
    lb.checkpoint.save(path, packed, metadata={"tokenizer": "bytes"})
    return path


@pytest.fixture(scope="session")
def logits():
    tokens = jnp.asarray(np.arange(8, dtype=np.int32)[None])
    call = jax.jit(lambda model, tokens: model(tokens))
    return lambda model: np.asarray(call(model, tokens))
