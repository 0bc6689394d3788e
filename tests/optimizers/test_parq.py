"""PARQ: the map is the proximal map of its regularizer, and training ends on the levels."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

import lowbit_jax as lb
from lowbit_jax import formats
from lowbit_jax.optimizers import inverse_slope, latent_params, parq, proximal_map
from lowbit_jax.quantizers import Absmax, AbsMean, MinMax
from lowbit_jax.spec import PerGroup, PerTensor, QuantSpec
from lowbit_jax.testing import assert_same_bits
from lowbit_jax.training.step import make_train_step, split

BINARY = AbsMean(QuantSpec(format=formats.BINARY))
TWO_BITS = Absmax(QuantSpec(format=formats.INT2_HALF))
TERNARY = AbsMean(QuantSpec(format=formats.TERNARY, granularity=PerTensor()))
NF4 = Absmax(QuantSpec(format=formats.NF4, granularity=PerGroup(8)))
UINT3 = MinMax(QuantSpec(format=formats.UINT3, symmetric=False))
ALL = (BINARY, TWO_BITS, TERNARY, NF4, UINT3)


def _u(seed=0, shape=(16, 2)):
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


def _levels(quantizer, u):
    """Every level of the one block that column 0 of `u` belongs to."""
    q = quantizer.freeze(jnp.asarray(u), {})
    codes = np.arange(2**q.spec.bits, dtype=np.uint8)
    values = np.unique(np.asarray(q.spec.format.round(q.spec.format.decode(jnp.asarray(codes)))))
    zero = 0.0 if q.zero_point is None else float(q.zero_point[0, 0])
    return (values.astype(np.float64) - zero) * float(q.scale[0, 0])


def _prox(u, levels, rho, *, points=4001):
    """argmin_w (w - u / rho)**2 / 2 + (1 / rho - 1) psi(w), by trying: no formula is shared.

    psi interpolates w**2 / 2 at the levels, and is infinite beyond the outermost ones.
    """
    w = np.union1d(np.linspace(levels[0], levels[-1], points), levels)
    psi = np.interp(w, levels, levels**2 / 2)
    return w[np.argmin((w - u / rho) ** 2 / 2 + (1 / rho - 1) * psi)]


@pytest.mark.parametrize("quantizer", ALL, ids=lambda q: q.spec.format.name)
@pytest.mark.parametrize("rho", [0.8, 0.25])
def test_the_map_is_the_proximal_map_of_the_regularizer(quantizer, rho):
    u = _u()
    got = np.asarray(proximal_map(jnp.asarray(u), quantizer, rho))
    levels = _levels(quantizer, u)
    rows = 8 if quantizer is NF4 else 16
    for i in range(rows):
        # Half a cell of the grid that was tried, twice: the objective is flat to that order.
        atol = (levels[-1] - levels[0]) / 4000
        np.testing.assert_allclose(got[i, 0], _prox(float(u[i, 0]), levels, rho), atol=atol)


@pytest.mark.parametrize("quantizer", ALL, ids=lambda q: q.spec.format.name)
def test_the_ends_are_the_identity_and_the_frozen_array(quantizer):
    u = jnp.asarray(_u(1))
    assert_same_bits(proximal_map(u, quantizer, 1.0), u)
    assert_same_bits(proximal_map(u, quantizer, 0.0), quantizer.freeze(u, {}).dequantize())


def test_values_that_are_levels_stay_and_outer_ones_saturate():
    u = jnp.asarray([[-3.0], [-1.5], [-0.5], [0.5], [1.5], [3.0], [0.0]], jnp.float32)
    # absmax 3 puts the levels at -3, -1, 1, 3.
    got = proximal_map(u, TWO_BITS, 0.5)
    np.testing.assert_allclose(got[:, 0], [-3, -1, -1, 1, 1, 3, 0], atol=1e-6)


def test_the_inverse_slope_is_the_normalized_sigmoid():
    rho = inverse_slope(10, 20, steepness=8.0)
    for t in range(30):
        f = (t - 10) / 10
        s = [1 / (1 + np.exp(8.0 * (x - 0.5))) for x in (f, 0.0, 1.0)]
        expected = 1.0 if t <= 10 else 0.0 if t >= 20 else (s[0] - s[2]) / (s[1] - s[2])
        # Three roundings of float32 of numbers below one.
        np.testing.assert_allclose(rho(jnp.int32(t)), expected, atol=1e-6)
    assert float(rho(10)) == 1.0
    assert float(rho(20)) == 0.0


def test_training_ends_on_levels_that_packing_keeps(toy):
    recipe = lb.Recipe.from_string("up|down=w2a16;embed=w4a16_asym")
    model = toy()
    optimizer = parq(optax.adamw(3e-3), model, recipe, rho=inverse_slope(2, 6))
    graphdef, state = split(model, optimizer)
    step = make_train_step(graphdef, optimizer)
    windows = jax.random.randint(jax.random.key(0), (4, 9), 0, 16)
    for _ in range(8):
        state, _ = step(state, windows)
    latent = nnx.merge(graphdef, latent_params(state.params, state.opt), state.rest)
    packed = lb.pack_model(lb.quantize_model(latent, recipe))
    trained = nnx.merge(graphdef, state.params, state.rest)
    for path, layer in lb.quantized_layers(packed):
        kernel = layer.quantized_kernel()
        name = layer.kernel_name
        got = getattr(getattr(trained, path), name)[...]
        # w + (w' - w) is w' up to half a unit in the last place of the larger one; |w| < 1.
        np.testing.assert_allclose(got, kernel, rtol=0, atol=2.0**-24)
        # While the latent weights have moved away from the levels.
        assert np.abs(getattr(getattr(latent, path), name)[...] - kernel).max() > 1e-3
    # Leaves that no rule matched are the optimizer's own.
    assert not np.array_equal(trained.up.bias[...], model.up.bias[...])


def test_with_rho_one_it_is_the_inner_optimizer():
    layer = nnx.Linear(4, 3, rngs=nnx.Rngs(0))
    params = nnx.state(layer, nnx.Param)
    grads = jax.tree.map(lambda p: jnp.full_like(p, 0.25), params)
    plain = optax.adamw(0.1)
    ours = parq(plain, layer, lb.Recipe(lb.Rule("", "w4a16")), rho=lambda count: jnp.float32(1))
    expected, state = params, plain.init(params)
    got, own = params, ours.init(params)
    for _ in range(3):
        steps, state = plain.update(grads, state, expected)
        expected = optax.apply_updates(expected, steps)
        steps, own = ours.update(grads, own, got)
        got = optax.apply_updates(got, steps)
    # u' - w and back is one rounding more.
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-6), got, expected)


def test_weight_decay_acts_on_the_latent_weights():
    layer = nnx.Linear(2, 1, use_bias=False, rngs=nnx.Rngs(0))
    layer.kernel[...] = jnp.asarray([[0.75], [0.25]], jnp.float32)
    params = nnx.state(layer, nnx.Param)
    decay = optax.chain(optax.add_decayed_weights(0.5), optax.scale(-1.0))
    optimizer = parq(decay, layer, lb.Recipe(lb.Rule("", "w1a16_pc")), rho=lambda count: 0.0)
    state = optimizer.init(params)
    zeros = jax.tree.map(jnp.zeros_like, params)
    steps, state = optimizer.update(zeros, state, params)
    params = optax.apply_updates(params, steps)
    np.testing.assert_array_equal(state.latent["kernel"][...], [[0.375], [0.125]])
    np.testing.assert_array_equal(params["kernel"][...], [[0.25], [0.25]])  # sign * mean |u|


@pytest.mark.parametrize(
    ("recipe", "error", "says"),
    [
        ("w4a8", NotImplementedError, "quantizes weights and nothing else"),
        ("w4a16_lsq", NotImplementedError, "LSQ has a state"),
        ("w4a16_dorefa", NotImplementedError, "rounds a function of the array"),
        ("w4a16_g64", ValueError, "does not split into groups"),
    ],
)
def test_recipes_that_no_optimizer_can_follow(toy, recipe, error, says):
    with pytest.raises(error, match=says):
        parq(optax.sgd(0.1), toy(), recipe, rho=inverse_slope(0, 1))


def test_other_parameters_and_schedules_are_refused(toy):
    optimizer = parq(optax.sgd(0.1), toy(), "w4a16", rho=inverse_slope(0, 1))
    with pytest.raises(ValueError, match=r"2 kernels .* the first being down/kernel"):
        optimizer.init({"other": jnp.zeros(3)})
    with pytest.raises(ValueError, match="0 <= start < end"):
        inverse_slope(3, 3)
    with pytest.raises(ValueError, match="steepness"):
        inverse_slope(0, 3, steepness=0.0)
