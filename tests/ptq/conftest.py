"""A small decoder with outliers in its activations, and calibration tokens; made once."""

import jax
import jax.numpy as jnp
import pytest
from flax import nnx

from lowbit_jax.models import Decoder, DecoderConfig


@pytest.fixture(scope="session")
def decoder():
    config = DecoderConfig(
        vocab=32, dim=16, layers=2, heads=4, kv_heads=2, ffn_dim=24, max_length=16
    )
    model = Decoder(config, rngs=nnx.Rngs(0))
    for i, layer in enumerate(model.layers):
        scale = jnp.exp(jax.random.normal(jax.random.key(i), (16,)))
        layer.attention_norm.scale[...] = scale
        layer.mlp_norm.scale[...] = scale[::-1]
    return model


@pytest.fixture(scope="session")
def batches():
    return [jax.random.randint(jax.random.key(i), (4, 16), 0, 32) for i in range(3)]
