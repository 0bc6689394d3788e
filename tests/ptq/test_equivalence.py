"""OmniQuant's learned equivalence leaves the function of a block as it is."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from lowbit_jax import calibrate, ptq
from lowbit_jax.ptq.layers import set_matrix
from lowbit_jax.ptq.reconstruction.variables import Start
from lowbit_jax.ptq.stage import Stage
from lowbit_jax.walk import layers


class Looks(Stage):
    """Compares a block with itself behind random scales, before anything is quantized."""

    def __init__(self, equivalence, left_float=()):
        self.equivalence, self.left_float = equivalence, left_float
        self.errors, self.moved = [], []

    def block(self, work):
        key = jax.random.key(3)
        matrices = {path: work.matrix(path) for path in work.weight_paths}
        starts = {
            path: Start(w, calibrate.absmax(w, work.spec(path))) for path, w in matrices.items()
        }
        starts = {path: s for path, s in starts.items() if path not in self.left_float}
        block = nnx.clone(work.working)
        found = self.equivalence.init(block, starts, work)
        for i, values in enumerate(found.values()):
            draw = jax.random.normal(jax.random.fold_in(key, i), values["log"].shape)
            values["log"] = values["log"] + draw
        self.equivalence.apply(found, block)
        modules = dict(layers(block))
        for path, start in starts.items():
            new = self.equivalence.start(found, path, start, work.spec(path))
            self.moved += [path] if new is not start else []
            set_matrix(modules[path], new.weight)
            largest = jnp.abs(new.weight).max(axis=-2)
            # 4 bits: -8 to 7, and 2 absmax over 15 steps.
            np.testing.assert_allclose(new.range.scale.reshape(-1), largest / 7.5, rtol=1e-6)
        before, after = (work.chain.outputs(b)[0] for b in (work.original, block))
        self.errors.append(float(jnp.abs(before - after).max() / jnp.abs(before).max()))
        ptq.RoundToNearest().block(work)


@pytest.mark.parametrize("links", ["norms", "all"])
@pytest.mark.parametrize("left_float", [(), ("attention/value", "mlp/up")])
def test_scales_leave_the_function_of_a_block(decoder, batches, links, left_float):
    stage = Looks(ptq.Equivalence(links=links), left_float)
    ptq.run(decoder, "w4a16", batches, [stage])
    # Sums of up to 24 products in float32, through two layers and a softmax.
    assert max(stage.errors) < 1e-5
    readers = {"query", "key", "value", "gate", "up"}
    if left_float:
        readers = set()  # a norm's scale goes through all the layers behind it, or none
    if links == "all":
        readers |= {"out", "down", "value", "up"} if not left_float else {"out", "down"}
    assert {path.split("/")[1] for path in stage.moved} == readers


def test_an_unknown_choice_of_links_is_refused():
    with pytest.raises(ValueError, match="'linear' is not of"):
        ptq.Equivalence(links="linear")
