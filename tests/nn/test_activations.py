import jax
import jax.numpy as jnp
import numpy as np

from lowbit_jax.nn.activations import RPReLU


def test_rprelu_is_that_of_reactnet_one_scalar_at_a_time():
    layer = RPReLU(3)
    layer.shift_in[...] = jnp.float32([0.5, 0.0, -1.0])
    layer.shift_out[...] = jnp.float32([0.0, 2.0, 1.0])
    layer.slope[...] = jnp.float32([0.25, 0.5, -1.0])
    x = np.float32([[-1.0, 0.5, -1.0], [0.5, -2.0, 3.0], [2.0, 0.0, -4.0]])
    expected = np.zeros_like(x)
    for (i, j), v in np.ndenumerate(x):
        gamma, zeta, beta = (
            float(p[...][j]) for p in (layer.shift_in, layer.shift_out, layer.slope)
        )
        expected[i, j] = v - gamma + zeta if v > gamma else beta * (v - gamma) + zeta
    np.testing.assert_array_equal(layer(jnp.asarray(x)), expected)


def test_rprelu_keeps_dtype_and_any_rank_and_passes_gradients():
    layer = RPReLU(4)
    assert layer(jnp.ones((2, 3, 4), jnp.bfloat16)).dtype == jnp.bfloat16
    g = jax.grad(lambda x: jnp.sum(layer(x)))(jnp.float32([[1.0, -1.0, 2.0, -2.0]]))
    assert g.tolist() == [[1.0, 0.25, 1.0, 0.25]]
