"""Quartet: a rotated, clipped MXFP4 forward pass and an unbiased MXFP4 backward pass."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

import lowbit_jax as lb
from lowbit_jax import formats
from lowbit_jax.models import MLP, MLPConfig
from lowbit_jax.ops.fp4_training import (
    block_hadamard,
    fp4_backward_product,
    stochastic_mxfp4,
)
from lowbit_jax.quantizers import QuEST
from lowbit_jax.scale_formats import E8M0

MX = lb.QuantSpec(format=formats.FP4_E2M1, granularity=lb.PerGroup(32), scale_format=E8M0)


def test_the_rotation_is_its_own_inverse_and_keeps_products():
    x = jax.random.normal(jax.random.key(0), (3, 64), jnp.float32)
    rotated = block_hadamard(x, 32)
    np.testing.assert_allclose(block_hadamard(rotated, 32), x, atol=1e-6)
    np.testing.assert_allclose(rotated @ rotated.T, x @ x.T, atol=1e-4)
    for order in (3, 128):
        with pytest.raises(ValueError, match="power of two that divides"):
            block_hadamard(x, order)


def test_stochastic_rounding_is_on_the_grid_unsaturated_and_unbiased():
    x = np.array(jax.random.normal(jax.random.key(0), (2, 32)), np.float32)
    x[1] = 0
    x[0, 0] = 7.99  # the worst case: just below the next power of two
    keys = jax.random.split(jax.random.key(1), 4096)
    samples = np.asarray(jax.jit(jax.vmap(lambda k: stochastic_mxfp4(jnp.asarray(x), k)))(keys))
    grid = np.array([0, 0.5, 1, 1.5, 2, 3, 4, 6])
    assert np.isin(np.abs(samples[:, 0]), grid).all()  # of the scale 1: log2(7.99) is in [2, 3)
    assert not samples[:, 1].any()
    # A value lies between two neighbours at most 2 apart: the deviation of a mean of n samples is
    # at most 1 / sqrt(n); five of them.
    np.testing.assert_allclose(samples.mean(0), 0.75 * x, atol=5 / np.sqrt(4096))


def test_gradients_are_unbiased_and_those_of_the_product():
    k1, k2, k3 = jax.random.split(jax.random.key(0), 3)
    x = jax.random.normal(k1, (2, 3, 8), jnp.float32)  # 6 rows and 5 columns are padded to 32
    w = jax.random.normal(k2, (8, 5), jnp.float32)
    g = jax.random.normal(k3, (2, 3, 5), jnp.float32)

    @jax.jit
    @jax.vmap
    def gradients(key):
        return jax.vjp(lambda x, w: fp4_backward_product(x, w, key), x, w)[1](g)

    n = 2048
    dx, dw = gradients(jax.random.split(jax.random.key(1), n))
    for got, expected in (
        (dx, jnp.einsum("abn,kn->abk", g, w)),
        (dw, jnp.einsum("abk,abn->kn", x, g)),
    ):
        got = np.asarray(got)
        error = got.std(0) / np.sqrt(n)
        # Five standard errors, each with that of the estimate itself.
        assert (np.abs(got.mean(0) - np.asarray(expected)) < 5.5 * error + 1e-6).all()
        assert error.max() > 0, "different keys give different gradients"


def test_quest_clips_at_the_scale_of_least_error_and_masks_what_it_clips():
    x = np.random.default_rng(0).normal(size=(64, 3)).astype(np.float32)
    x[5, 1] = 9.0
    g = np.random.default_rng(1).normal(size=x.shape).astype(np.float32)
    value, vjp = jax.vjp(lambda x: QuEST(MX).fake_quant(x, {}), jnp.asarray(x))
    dx = np.asarray(vjp(jnp.asarray(g))[0])
    levels = np.array([0, 0.5, 1, 1.5, 2, 3, 4, 6])
    levels = np.concatenate([-levels[::-1], levels])
    clipped = 0
    for group in range(2):
        for j in range(3):
            own = x[32 * group : 32 * group + 32, j].astype(np.float64)
            wanted = 2.92247856 / 6 * np.sqrt(np.mean(own**2))
            scale = 2.0 ** np.round(np.log2(wanted))
            for i, v in enumerate(own, 32 * group):
                nearest = levels[np.argmin(np.abs(levels - v / scale))]
                np.testing.assert_allclose(value[i, j], nearest * scale, rtol=1e-6)
                inside = abs(v) <= 6 * scale
                clipped += not inside
                assert dx[i, j] == (g[i, j] if inside else 0.0)
    assert clipped > 0


def _model():
    model = MLP(MLPConfig(64, (64,), 4), rngs=nnx.Rngs(0))
    return lb.quantize_model(model, lb.Recipe(lb.Rule(".*", "mxfp4_quartet")))


def test_a_layer_multiplies_rotated_operands_and_packs_them():
    model = _model()
    layer = model.layers[0]
    x = jax.random.normal(jax.random.key(2), (6, 64), jnp.float32)
    rows = lb.QuantSpec(format=formats.FP4_E2M1, granularity=lb.PerToken(32), scale_format=E8M0)
    x_hat = QuEST(rows).fake_quant(block_hadamard(x, 32), {})
    rotated = block_hadamard(layer.kernel[...].T, 32).T
    expected = x_hat @ QuEST(MX).fake_quant(rotated, {}) + layer.bias[...].reshape(1, -1)
    np.testing.assert_allclose(layer(x), expected, rtol=1e-5, atol=1e-5)
    packed = lb.pack_model(model)
    assert not hasattr(packed.layers[0], "gradient_stream")
    # Inputs that lie on a rounding boundary may fall to the other side when summed otherwise.
    assert np.mean(np.abs(np.asarray(packed.layers[0](x) - expected)) > 1e-4) < 0.02
    plain = lb.dequantize_model(packed)
    got = block_hadamard(plain.layers[0].kernel[...].T, 32).T
    np.testing.assert_allclose(got, packed.layers[0].matrix.dequantize(), atol=1e-6)


@pytest.mark.slow
def test_a_tiny_network_learns_and_its_keys_move_on():
    model = _model()
    x = jax.random.normal(jax.random.key(3), (64, 64), jnp.float32)
    labels = jnp.argmax(x[:, :4], axis=-1)
    optimizer = optax.adam(3e-3)
    graphdef, params, rest = nnx.split(model, nnx.Param, ...)
    opt = optimizer.init(params)

    @jax.jit
    def step(params, rest, opt):
        def loss_of(params):
            model = nnx.merge(graphdef, params, rest, copy=True)
            logits = model(x)
            loss = optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean()
            return loss, nnx.split(model, nnx.Param, ...)[2]

        (loss, new), grads = jax.value_and_grad(loss_of, has_aux=True)(params)
        updates, opt2 = optimizer.update(grads, opt, params)
        return optax.apply_updates(params, updates), new, opt2, loss

    losses = []
    for _ in range(40):
        params, rest, opt, loss = step(params, rest, opt)
        losses.append(float(loss))
    assert np.mean(losses[-5:]) < 0.5 * losses[0]
    counts = [
        int(v[...])
        for v in jax.tree.leaves(
            nnx.filter_state(rest, nnx.RngCount), is_leaf=lambda v: isinstance(v, nnx.Variable)
        )
    ]
    assert counts == [40, 40]


def test_what_it_does_not_know_is_refused():
    scheme = lb.presets["mxfp4_quartet"]
    assert lb.LayerScheme.from_dict(scheme.to_dict()) == scheme
    assert "rotated by 32, mxfp4 backward" in scheme.describe()
    with pytest.raises(ValueError, match="no power of two"):
        lb.LayerScheme(weight=QuEST(MX), hadamard=24)
    with pytest.raises(ValueError, match="backward='fp8'"):
        lb.LayerScheme(weight=QuEST(MX), backward="fp8")
    embedding = nnx.Dict(embed=nnx.Embed(64, 32, rngs=nnx.Rngs(0)))
    with pytest.raises(NotImplementedError, match=r"embed: .*those of Linear layers"):
        lb.quantize_model(embedding, lb.Recipe(lb.Rule(".*", "mxfp4_quartet")))
