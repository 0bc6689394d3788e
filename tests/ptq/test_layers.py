"""Rows of a layer's input times its matrix are the layer's output, whatever the layer."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from lowbit_jax.ptq.layers import get_matrix, input_rows, set_matrix

RNGS = nnx.Rngs(0)
CASES = {
    "linear": (nnx.Linear(6, 5, use_bias=False, rngs=RNGS), (2, 3, 6), (6, 5)),
    "einsum": (nnx.Einsum("btd,dhk->bthk", (6, 2, 3), rngs=RNGS), (2, 3, 6), (6, 6)),
    "experts": (nnx.Einsum("bed,edf->bef", (3, 6, 4), rngs=RNGS), (5, 3, 6), (3, 6, 4)),
    "conv": (nnx.Conv(3, 5, (3, 2), use_bias=False, rngs=RNGS), (2, 6, 5, 3), (18, 5)),
    "strided": (
        nnx.Conv(3, 5, (3, 3), strides=2, padding=1, use_bias=False, rngs=RNGS),
        (2, 7, 6, 3),
        (27, 5),
    ),
    "grouped": (
        nnx.Conv(4, 6, (3,), feature_group_count=2, padding="VALID", use_bias=False, rngs=RNGS),
        (2, 7, 4),
        (2, 6, 3),
    ),
    "dilated": (
        nnx.Conv(2, 3, (3,), kernel_dilation=2, use_bias=False, rngs=RNGS),
        (2, 9, 2),
        (6, 3),
    ),
}


@pytest.mark.parametrize("case", list(CASES))
def test_rows_times_matrix_are_the_output(case):
    layer, shape, _ = CASES[case]
    x = jax.random.normal(jax.random.key(1), shape)
    product = jnp.matmul(input_rows(layer, x), get_matrix(layer))
    output = layer(x)
    if product.ndim == 3:  # a stack in front of the tokens; the output has it in its features
        stack = product.shape[0]
        tokens = output.reshape(-1, stack, product.shape[-1])
        product = product.transpose(1, 0, 2)
        output = tokens
    # Sums of at most 30 products of order one, in another order.
    np.testing.assert_allclose(product.ravel(), output.ravel(), atol=1e-5)


def test_rows_of_several_axes_are_merged_as_the_matrix_is():
    layer = nnx.LinearGeneral((3, 2), (4,), axis=(1, 3), use_bias=False, rngs=nnx.Rngs(0))
    x = jax.random.normal(jax.random.key(1), (2, 3, 5, 2))
    product = jnp.matmul(input_rows(layer, x), get_matrix(layer))
    np.testing.assert_allclose(product, layer(x).reshape(-1, 4), atol=1e-5)


@pytest.mark.parametrize("case", list(CASES))
def test_a_matrix_that_was_set_is_got_again(case):
    layer, _, shape = CASES[case]
    layer = nnx.clone(layer)
    matrix = jax.random.normal(jax.random.key(2), shape)
    set_matrix(layer, matrix)
    np.testing.assert_array_equal(get_matrix(layer), matrix)
