"""Huge pages change no contents, and what cannot have them is passed over."""

import sys

import jax
import jax.numpy as jnp
import numpy as np

from kernels_cpu import memory


def test_contents_stay_and_only_whole_pages_are_counted():
    arrays = [jnp.arange(5 << 18, dtype=jnp.int32) + i for i in range(3)]  # 5 MB each
    before = [np.array(array) for array in arrays]
    got = memory.settle(arrays)
    assert got % memory.HUGE == 0
    if not sys.platform.startswith("linux"):
        assert got == 0
    for array, old in zip(arrays, before, strict=True):
        np.testing.assert_array_equal(array, old)


def test_what_is_no_array_here_is_passed_over():
    assert memory.settle([None, 3, np.ones(1 << 20), jnp.zeros((0, 4))]) == 0
    seen = []

    @jax.jit
    def traced(x):
        seen.append(memory.settle([x]))
        return x + 1

    traced(jnp.ones(1 << 20))
    assert seen == [0]
    mesh = jax.make_mesh((len(jax.devices()),), ("a",))
    spread = jax.device_put(jnp.ones((64, 1 << 14)), jax.NamedSharding(mesh, jax.P("a")))
    assert len(jax.devices()) > 1
    assert memory.settle([spread]) == 0
