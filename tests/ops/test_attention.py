"""`ops.attend`: kernels and XLA agree, names obey or say why not."""

import jax.numpy as jnp
import numpy as np
import pytest

import lowbit_jax as lb
from lowbit_jax.generation.quantized_cache import SPECS
from lowbit_jax.ops import attend


def packed(name, seed, width=32):
    array = np.random.default_rng(seed).normal(size=(1, 64, 2, width)).astype(np.float32)
    return lb.quantize(jnp.asarray(array), SPECS[name])


@pytest.mark.parametrize("name", sorted(SPECS))
def test_the_kernel_gives_what_xla_gives(name):
    query = jnp.asarray(np.random.default_rng(0).normal(size=(1, 1, 4, 32)), jnp.float32)
    keys, values = packed(name, 1), packed(name, 2)
    options = {"window": 9, "softcap": 3.0, "scale": 0.5}
    got, want = (
        attend(query, keys, values, 23, implementation=how, **options)
        for how in ("interpret", "xla")
    )
    # float32 throughout, in another order: products of 32 features, sums of 9 positions.
    np.testing.assert_allclose(got, want, rtol=0, atol=2e-6 * float(jnp.abs(want).max()) * 9)


def test_a_name_obeys_or_says_why():
    query = jnp.zeros((1, 1, 4, 32))
    keys = packed("int8", 1)
    with pytest.raises(ValueError, match="no implementation 'cuda'"):
        attend(query, keys, keys, 1, implementation="cuda")
    with pytest.raises(NotImplementedError, match="the default backend is 'cpu', not 'gpu'"):
        attend(query, keys, keys, 1, implementation="mosaic_gpu")
    with pytest.raises(NotImplementedError, match="2 new positions; the kernels take one"):
        attend(jnp.zeros((1, 2, 4, 32)), keys, keys, 2, implementation="interpret")
    with pytest.raises(NotImplementedError, match=r"keys are .*, values"):
        attend(query, keys, packed("int4", 1), 1, implementation="interpret")
    whole = lb.quantize(jnp.ones((1, 64, 2, 32)), lb.QuantSpec(format=lb.INT8))
    with pytest.raises(ValueError, match="one per position and head is needed"):
        attend(query, whole, whole, 1)
    assert attend(query, keys, keys, 1).shape == query.shape
