import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

from lowbit_jax import formats
from lowbit_jax.blocks import BlockView, divided, reduce_matrix, rounded_cast
from lowbit_jax.spec import Block, PerChannel, PerGroup, PerTensor, PerToken, QuantSpec

pytestmark = pytest.mark.usefixtures("strict_dtypes")

CASES = [
    (PerTensor(), (2, 8, 6)),
    (PerChannel(), (8, 6)),
    (PerGroup(4), (2, 8, 6)),
    (Block(4, 3), (2, 8, 6)),
    (Block(None, 3), (8, 6)),
    (Block(1, 1), (4, 2)),
    (PerChannel(), (1, 6)),
    (PerToken(), (2, 3, 8)),
    (PerToken(4), (3, 8)),
    (PerToken(1), (3, 8)),
]


@pytest.mark.parametrize(("granularity", "shape"), CASES, ids=str)
def test_reducing_over_blocks_is_a_loop_over_blocks(granularity, shape):
    spec = QuantSpec(format=formats.INT4, granularity=granularity)
    view = BlockView.of(shape, spec)
    x = np.random.default_rng(0).normal(size=shape).astype(np.float32)
    expected = np.full(view.scale_shape, -np.inf, np.float32)
    for index, v in np.ndenumerate(x):
        block = tuple(i * s // n for i, s, n in zip(index, view.scale_shape, shape, strict=True))
        expected[block] = max(expected[block], v)
    np.testing.assert_array_equal(view.reduce(jnp.max, jnp.asarray(x)), expected)
    assert view.block_size * np.prod(view.scale_shape) == x.size
    np.testing.assert_array_equal(view.merge(view.split(jnp.asarray(x))), x)
    # The split scale broadcasts against the split array at equal rank.
    spread = jnp.broadcast_to(view.split_scale(jnp.asarray(expected)), view.split_shape)
    for index, v in np.ndenumerate(np.asarray(view.merge(spread))):
        block = tuple(i * s // n for i, s, n in zip(index, view.scale_shape, shape, strict=True))
        assert v == expected[block]


def test_a_matrix_is_two_axes_of_a_block_and_a_row_of_a_token():
    x = jnp.arange(24, dtype=jnp.float32).reshape(2, 3, 4)
    matrices, rows = (
        reduce_matrix(jnp.max, x, QuantSpec(format=formats.INT4, granularity=granularity))
        for granularity in (PerGroup(3), PerToken())
    )
    np.testing.assert_array_equal(matrices, [[[11.0]], [[23.0]]])
    assert rows.shape == (2, 3, 1)


@pytest.mark.parametrize(
    ("shape", "scale_shape"),
    [((64, 32), (1, 1)), ((64, 32), (1, 32)), ((2, 64, 16), (2, 1, 1)), ((8, 4), (8, 4))],
)
def test_a_quotient_is_the_product_with_the_reciprocal_in_every_program(shape, scale_shape):
    rng = np.random.default_rng(1)
    x = rng.normal(size=shape).astype(np.float32)
    scale = rng.uniform(0.1, 1, scale_shape).astype(np.float32)
    expected = x * (np.float32(1) / scale)
    np.testing.assert_array_equal(divided(jnp.asarray(x), jnp.asarray(scale)), expected)
    np.testing.assert_array_equal(jax.jit(divided)(x, scale), expected)


@pytest.mark.parametrize("dtype", [ml_dtypes.bfloat16, np.float16, np.float32])
def test_casts_round_once_as_numpy_does(dtype):
    rng = np.random.default_rng(2)
    x = np.exp2(rng.uniform(-30, 15, 4096)) * rng.choice([-1, 1], 4096)
    x = np.concatenate([x, [0.0, -0.0, 2.0**-24, 2.0**-25, 3 * 2.0**-25, 65504.0, np.nan]])
    x = x.astype(np.float32)
    expected = x.astype(dtype)
    for f in (rounded_cast, jax.jit(rounded_cast, static_argnums=1)):
        got = np.asarray(f(jnp.asarray(x), jnp.dtype(dtype)))
        assert got.dtype == dtype
        np.testing.assert_array_equal(got.astype(np.float32), expected.astype(np.float32))
