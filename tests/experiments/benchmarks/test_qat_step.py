import jax
import jax.numpy as jnp
import pytest

import lowbit_jax as lb
from experiments.benchmarks import qat_step

SIZES = qat_step.Sizes(dim=32, layers=1, ffn_dim=32, batch=2, length=8)


@pytest.mark.slow
def test_a_packed_model_that_computes_something_else_stops_the_benchmark(monkeypatch):
    model = lb.quantize_model(SIZES.model(), "w1_58a16")
    tokens = jax.random.randint(jax.random.key(0), (2, 9), 0, 256)
    qat_step.check(model, "w1_58a16", tokens)

    other = lb.pack_model(lb.quantize_model(SIZES.model(), "w1a16"))
    monkeypatch.setattr(lb, "pack_model", lambda _: other)
    with pytest.raises(AssertionError, match="w1_58a16: packed loss"):
        qat_step.check(model, "w1_58a16", tokens)


def test_a_step_goes_on_from_the_last_one_and_leaves_the_model_alone():
    model = SIZES.model()
    before = model.head.kernel[...]
    step = qat_step.stepper(model, jnp.zeros((2, 9), jnp.int32))
    losses = [float(step()[1].loss) for _ in range(3)]
    assert losses[2] < losses[0]  # zeros only: even three steps learn that
    assert not model.head.kernel[...].is_deleted()
    assert (model.head.kernel[...] == before).all()
