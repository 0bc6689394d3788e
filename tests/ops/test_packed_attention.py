"""Packed keys and values are read in stretches, whose length changes nothing."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lowbit_jax.ops.packed_attention import packed_scores, packed_sum


@dataclasses.dataclass(frozen=True)
class Given:
    """Rows with a scale per position and head, in units of two positions."""

    levels: np.ndarray
    scale: np.ndarray
    unit: int = 2

    @property
    def positions(self):
        return self.levels.shape[1]

    def decode(self, start, count):
        return tuple(
            jax.lax.dynamic_slice_in_dim(jnp.asarray(x), start, count, axis=1)
            for x in (self.levels, self.scale)
        )


# All at once; one stretch and a rest; three and a rest; four and none; not a whole unit.
@pytest.mark.parametrize(
    ("positions", "chunk"), [(14, 20), (14, 10), (14, 4), (16, 4), (14, 5), (6, 1)]
)
def test_scores_and_sums_are_those_of_the_dense_arrays(positions, chunk):
    rng = np.random.default_rng(positions)
    query = np.float32(rng.integers(-8, 8, (2, 3, 2, 2, 4)))
    levels = np.float32(rng.integers(-8, 8, (2, positions, 2, 4)))
    scale = np.float32(2.0 ** rng.integers(-3, 3, (2, positions, 2)))
    weights = np.float32(rng.integers(0, 8, (2, 2, 2, 3, positions)))
    rows, dense = Given(levels, scale), levels * scale[..., None]
    # Integers and powers of two: every sum is exact in whatever order.
    np.testing.assert_array_equal(
        packed_scores(jnp.asarray(query), rows, chunk=chunk),
        np.einsum("btghd,bsgd->bghts", query, dense),
    )
    np.testing.assert_array_equal(
        packed_sum(jnp.asarray(weights), rows, jnp.dtype("float32"), chunk=chunk),
        np.einsum("bghts,bsgd->btghd", weights, dense),
    )
