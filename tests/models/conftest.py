"""Random models without their initializers, which take longer to compile than the models."""

from collections.abc import Callable

import jax
import numpy as np
import pytest
from flax import nnx


def draw_model(make: Callable[[], nnx.Module]) -> nnx.Module:
    """The model that `make` would build, with random parameters; statistics as at the start.

    Also norms and biases are random: at 1 and 0, where training starts, a wrong one would not show.
    """
    graphdef, state = nnx.split(nnx.eval_shape(make))
    rng = np.random.default_rng(0)

    def draw(path, leaf):
        if not isinstance(leaf, nnx.Param):
            return leaf.replace(np.full(leaf.shape, path[-1] == "var", np.float32))
        near, spread = (1.0, 0.3) if path[-1] == "scale" else (0.0, leaf.shape[0] ** -0.5)
        return leaf.replace(np.float32(near + spread * rng.normal(size=leaf.shape)))

    return nnx.merge(graphdef, jax.device_put(nnx.map_state(draw, state)))


@pytest.fixture(scope="session", name="draw_model")
def _draw_model() -> Callable[[Callable[[], nnx.Module]], nnx.Module]:
    return draw_model
