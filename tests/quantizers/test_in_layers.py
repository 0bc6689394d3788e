"""The zoo's presets in a layer: every leaf gets a gradient, and packing keeps the bits."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import lowbit_jax as lb
from lowbit_jax.testing import assert_same_bits

# One preset of every quantizer that a layer can hold.
PRESETS = (
    "w1a16_bc", "w1a1_bnn", "w1a1_bireal", "w1a1_reactnet", "w1a16_elastic", "w2a16_stretched",
    "w1_58a16_twn", "w3a3_pact", "w5a16_apot", "mxfp6_e2m3",
)  # fmt: skip


@pytest.mark.parametrize("preset", PRESETS)
def test_a_layer_trains_and_packs(preset):
    layer = lb.nn.QLinear(nnx.Linear(32, 8, rngs=nnx.Rngs(0)), lb.presets[preset])
    x = jax.random.uniform(jax.random.key(1), (4, 32), jnp.float32, -0.5, 9.0)
    gradients = nnx.grad(lambda layer: jnp.sum(layer(x) ** 2))(layer)
    leaves = {name: np.asarray(g[...]) for name, g in gradients.items()}
    learned = {
        f"{part}_{leaf}"
        for part, q in (("kernel", layer.scheme.weight), ("input", layer.scheme.input))
        if q is not None
        for leaf in q.trainable
    }
    assert set(leaves) == {"kernel", "bias"} | learned
    for name, g in leaves.items():
        assert np.isfinite(g).all(), name
        assert g.any(), name
    packed = lb.nn.PackedLinear(layer)
    assert_same_bits(packed.kernel.get_value().dequantize(), layer.quantized_kernel())
