import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lowbit_jax import calibrate, formats
from lowbit_jax.quantizers import LSQ
from lowbit_jax.scale_formats import E4M3
from lowbit_jax.spec import PerGroup, QuantSpec

pytestmark = pytest.mark.usefixtures("strict_dtypes")

SPEC = QuantSpec(format=formats.INT3, granularity=PerGroup(16))


def _w(seed=0):
    return jnp.asarray(np.random.default_rng(seed).normal(size=(32, 4)), jnp.float32)


@pytest.mark.parametrize("start", ["mse", "absmax"])
def test_it_starts_from_the_range_that_was_asked_for(start):
    state = LSQ(SPEC, start=start).init(_w())
    assert set(state) == set(LSQ.trainable)
    expected = getattr(calibrate, start)(_w(), SPEC).scale
    np.testing.assert_array_equal(state["scale"], expected)


def test_learning_the_scale_lowers_the_error():
    q, w = LSQ(SPEC, start="absmax", gradient_scale=False), _w()

    def loss(state):
        return jnp.sum((q.fake_quant(w, state) - w) ** 2)

    state = q.init(w)
    before = float(loss(state))
    step = jax.jit(
        lambda s: jax.tree.map(lambda a, g: a - np.float32(1e-3) * g, s, jax.grad(loss)(s))
    )
    for _ in range(50):
        state = step(state)
    # Half-way at least to the searched optimum, from which the gradient rule knows nothing.
    best = float(loss(LSQ(SPEC).init(w)))
    assert float(loss(state)) < (before + best) / 2


@pytest.mark.parametrize("scale", [0.0, -1.0])
def test_a_scale_driven_to_zero_or_below_is_used_at_the_smallest_and_can_come_back(scale):
    q, w = LSQ(SPEC), _w()
    state = {"scale": jnp.full((2, 4), scale, jnp.float32)}
    value, gradient = jax.value_and_grad(lambda s: jnp.sum((q.fake_quant(w, s) - w) ** 2))(state)
    assert np.isfinite(value)
    # Every weight saturates, so that a larger scale would lower the error.
    assert (np.asarray(gradient["scale"]) < 0).all()


def test_weights_beyond_the_range_get_no_gradient():
    q = LSQ(QuantSpec(format=formats.INT4))
    w = jnp.float32([[0.3], [7.2], [-9.0], [6.9]])
    state = {"scale": jnp.ones((1, 1), jnp.float32)}
    gradient = jax.grad(lambda w: jnp.sum(q.fake_quant(w, state)))(w)
    assert gradient[:, 0].tolist() == [1.0, 0.0, 0.0, 1.0]


def test_unsupported_grids_and_unknown_starts_are_refused():
    for spec in (
        QuantSpec(format=formats.NF4),
        QuantSpec(format=formats.FP4_E2M1),
        QuantSpec(format=formats.INT4, scale_format=E4M3),
    ):
        with pytest.raises(NotImplementedError, match=spec.format.name):
            LSQ(spec)
    with pytest.raises(ValueError, match=r"'best'.*'mse'"):
        LSQ(SPEC, start="best")
