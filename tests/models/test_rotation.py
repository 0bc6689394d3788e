"""Hadamard matrices of all the ways they are built, and layers behind them."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from lowbit_jax.models.rotation import (
    Rotated,
    Rotation,
    apply_hadamard,
    hadamard,
    hadamard_base,
    random_orthogonal,
    signs,
)

# Sylvester; Paley I (12, 20, 44) and II (28, 36); Williamson; products.
ORDERS = [1, 2, 8, 12, 20, 28, 36, 44, 64, 172, 344, 96]


@pytest.mark.parametrize("order", ORDERS)
def test_matrices_are_orthogonal_with_equal_magnitudes(order):
    matrix = hadamard(order)
    np.testing.assert_allclose(matrix @ matrix.T, np.eye(order), rtol=0, atol=1e-6)
    np.testing.assert_allclose(np.abs(matrix), order**-0.5, rtol=1e-12)


@pytest.mark.parametrize("order", [2, 12, 56, 172])
def test_the_fast_transform_is_the_product(order):
    x = jax.random.normal(jax.random.key(order), (3, order))
    expected = np.asarray(x, np.float64) @ hadamard(order)
    # Sums of `order` float32 terms of magnitude about 1 / sqrt(order), in another order.
    atol = 4 * np.sqrt(order) * np.finfo(np.float32).eps * np.abs(x).max()
    np.testing.assert_allclose(apply_hadamard(x), expected, rtol=0, atol=atol)


def test_widths_of_real_models_have_one():
    widths = (4096, 5120, 8192, 11008, 13824, 14336, 5632, 8960, 18944, 172, 896, 4864, 6912)
    assert all(hadamard_base(width) is not None for width in widths)
    assert [hadamard_base(n) for n in (64, 96, 11008, 6, 22)] == [1, 12, 172, None, None]
    with pytest.raises(ValueError, match="no Hadamard matrix of order 22"):
        signs(22)


def test_a_random_orthogonal_matrix_is_one_and_repeats():
    matrix = random_orthogonal(9, jax.random.key(0))
    np.testing.assert_allclose(matrix @ matrix.T, np.eye(9), rtol=0, atol=1e-12)
    np.testing.assert_array_equal(matrix, random_orthogonal(9, jax.random.key(0)))


@pytest.mark.parametrize("matrix", [None, "random"])
def test_a_rotation_mixes_groups_and_keeps_what_is_inside(matrix):
    if matrix is not None:
        matrix = jnp.asarray(random_orthogonal(4, jax.random.key(0)), jnp.float32)
    rotation = Rotation(4, 3, matrix)
    x = jax.random.normal(jax.random.key(1), (2, 12))
    expected = np.asarray(x, np.float64) @ rotation.dense()
    np.testing.assert_allclose(rotation(x), expected, rtol=0, atol=1e-6)
    assert rotation(x.astype(jnp.bfloat16)).dtype == jnp.bfloat16
    assert not jax.tree.leaves(nnx.state(rotation, nnx.Param))  # neither trained nor quantized


def test_a_rotated_layer_undoes_what_is_in_its_kernel():
    linear = nnx.Linear(8, 3, rngs=nnx.Rngs(0))
    x = jax.random.normal(jax.random.key(1), (2, 8))
    expected, rotation = linear(x), Rotation(8)
    linear.kernel[...] = jnp.asarray(rotation.dense().T @ linear.kernel[...], jnp.float32)
    np.testing.assert_allclose(Rotated(linear, rotation)(x), expected, rtol=0, atol=1e-5)
