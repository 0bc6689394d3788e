import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

import lowbit_jax as lb
from lowbit_jax.checkpoint import tree
from lowbit_jax.testing import assert_same_bits


def test_a_tree_holds_plain_arrays_and_gives_the_state_back():
    specs = [lb.presets[name].weight.spec for name in ("nvfp4a16", "w3a16_asym")]
    q, z = jax.jit(lambda x: [lb.quantize(x, spec) for spec in specs])(jnp.ones((32, 4)))
    model = nnx.Dict(
        layers=nnx.List([nnx.Dict(kernel=lb.Packed(q), mask=nnx.data(jnp.arange(3)))]),
        other=nnx.Dict(kernel=lb.Packed(z), bias=nnx.Param(jnp.zeros(4))),
    )
    state = nnx.state(model)
    plain = tree.to_tree(state)
    assert set(plain["layers"]["0"]["kernel"]) == {"words_0", "scale", "global_scale"}
    assert set(plain["other"]["kernel"]) == {"words_0", "words_1", "scale", "zero_point"}
    assert plain["layers"]["0"]["kernel"]["words_0"].dtype == np.int32
    back = tree.from_tree(plain, state)
    assert_same_bits(back, state)
    described = tree.describe(state)
    assert described["other/bias"] == {"shape": [4], "dtype": "float32"}
    assert described["layers/0/mask"] == {"shape": [3], "dtype": "int32"}
    assert described["other/kernel"]["shape"] == [32, 4]
