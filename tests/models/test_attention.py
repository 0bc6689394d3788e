"""Rotary positions do what they are for."""

import jax
import jax.numpy as jnp
import numpy as np

from lowbit_jax.models.attention import rotate

EPS = np.finfo(np.float32).eps

turn = jax.jit(rotate, static_argnames="theta")


def test_pairs_lie_half_a_head_apart_and_turn_by_their_own_frequency():
    x = np.zeros((1, 3, 1, 4), np.float32)
    x[..., 1] = 1.0
    got = np.asarray(turn(x, jnp.array([0, 1, 50]), theta=100.0))[0, :, 0]
    angle = np.array([0, 1, 50]) * 100.0 ** (-2 / 4)  # the second of two pairs
    want = np.stack([np.zeros(3), np.cos(angle), np.zeros(3), np.sin(angle)], axis=1)
    # The angle, at most 5, is rounded twice (frequency and product), cos and sin once more.
    np.testing.assert_allclose(got, want, rtol=0, atol=(2 * 5 + 1) * EPS)


def test_scores_depend_on_distance_only():
    query, key = np.float32(np.random.default_rng(0).normal(size=(2, 1, 1, 1, 8)))

    def score(at, behind):
        q = turn(query, jnp.array([at]), theta=1e4)
        k = turn(key, jnp.array([at - behind]), theta=1e4)
        return float(np.sum(np.asarray(q) * np.asarray(k)))

    # An angle near 1000 is held to 1000 * eps, which moves a score by that times both lengths.
    atol = 4 * 1000 * EPS * np.linalg.norm(query) * np.linalg.norm(key)
    assert abs(score(3, 2) - score(1000, 2)) <= atol
    assert abs(score(3, 2) - score(3, 1)) > atol


def test_rotation_is_computed_in_float32_whatever_the_input():
    x = jnp.asarray(np.random.default_rng(0).normal(size=(1, 1, 1, 8)), jnp.bfloat16)
    positions = jnp.array([777])  # not a bfloat16 number: there the angle would be of 776
    got = turn(x, positions, theta=1e4)
    assert got.dtype == jnp.bfloat16
    want = turn(x.astype(jnp.float32), positions, theta=1e4).astype(jnp.bfloat16)
    np.testing.assert_array_equal(got, want)
