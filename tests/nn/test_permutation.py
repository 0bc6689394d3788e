"""A packed layer whose rows are stored in another order, as GPTQ's activation order leaves them."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import lowbit_jax as lb
from lowbit_jax.nn import Packed
from lowbit_jax.testing import assert_same_bits, dot_tolerance

call = jax.jit(lambda model, x: model(x))


class Model(nnx.Module):
    def __init__(self):
        self.layer = nnx.Linear(64, 24, rngs=nnx.Rngs(0))

    def __call__(self, x):
        return self.layer(x)


@pytest.mark.parametrize("preset", ["w4a16_g32", "w4a8"])
def test_rows_in_another_order_are_the_same_layer(preset):
    order = np.random.default_rng(0).permutation(64)
    x = np.random.default_rng(1).normal(size=(3, 64)).astype(np.float32)
    plain = lb.pack_model(lb.quantize_model(Model(), preset))
    # The same kernel with its rows sorted otherwise, and the order beside it.
    sorted_rows = Model()
    sorted_rows.layer.kernel[...] = plain.layer.quantized_kernel()[order]
    sorted_rows.layer.bias = plain.layer.bias
    stored = lb.pack_model(lb.quantize_model(sorted_rows, preset))
    stored.layer.input_permutation = Packed(jnp.asarray(order, jnp.int32))
    kernel = np.asarray(stored.layer.quantized_kernel())
    # Quantized again in other groups: a value of its own grid, within a step of the first one's.
    if preset == "w4a8":  # one scale a column, so that the codes are the same
        step = np.abs(kernel).max(axis=0) / 7
        assert (np.abs(kernel - np.asarray(plain.layer.quantized_kernel())) <= step).all()
    largest = np.abs(x).max(axis=1, keepdims=True)
    scale = largest * np.float32(1 / 127)
    x_hat = np.round(x * (np.float32(1) / scale)) * scale if preset == "w4a8" else x
    exact = x_hat.astype(np.float64) @ kernel
    for model in (stored, lb.prepare_model(stored)):
        np.testing.assert_allclose(call(model, x), exact, atol=dot_tolerance(x, kernel))
    assert_same_bits(lb.prepare_model(stored).layer.quantized_kernel(), kernel)


def test_a_checkpoint_keeps_the_order(tmp_path):
    stored = lb.pack_model(lb.quantize_model(Model(), "w4a16_g32"))
    order = np.random.default_rng(0).permutation(64)
    stored.layer.input_permutation = Packed(jnp.asarray(order, jnp.int32))
    lb.checkpoint.save(tmp_path / "model", stored)
    loaded = lb.checkpoint.load(tmp_path / "model", nnx.eval_shape(Model), verify=True)
    np.testing.assert_array_equal(loaded.layer.input_permutation.get_value(), order)
    assert_same_bits(loaded.layer.quantized_kernel(), stored.layer.quantized_kernel())
