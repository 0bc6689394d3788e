"""BitNet b1.58, XNOR-Net and LSQ, transcribed one scalar at a time."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lowbit_jax import formats
from lowbit_jax.estimators import lsq
from lowbit_jax.quantizers import LSQ, XNOR, Absmax, AbsMean
from lowbit_jax.spec import PerTensor, PerToken, QuantSpec

pytestmark = pytest.mark.usefixtures("strict_dtypes")


def test_ternary_weights_are_those_of_bitnet():
    w = np.random.default_rng(0).normal(size=(64, 16)).astype(np.float32) * 0.02
    gamma = np.mean(np.abs(w), dtype=np.float64)  # arXiv:2402.17764, Eq. 3
    expected = np.zeros_like(w)
    for index, v in np.ndenumerate(w):
        expected[index] = max(-1, min(1, round(float(v) / (gamma + 1e-5))))  # Eqs. 1 and 2
    quantizer = AbsMean(QuantSpec(format=formats.TERNARY, granularity=PerTensor()))
    q = quantizer.freeze(jnp.asarray(w), {})
    # max(gamma, eps) instead of gamma + eps moves the threshold by 1e-5 of 0.016: weights between
    # the two are not counted.
    clear = np.abs(np.abs(w) / gamma - 0.5) > 1e-3
    assert clear.mean() > 0.99
    np.testing.assert_array_equal((np.asarray(q.codes()).astype(int) - 1)[clear], expected[clear])
    # The fixed point of the mean: an element is rounded to max * 2**-(30 - 6), of which half.
    error = abs(float(q.scale[0, 0]) - gamma)
    assert error <= np.abs(w).max() * 2.0**-25 + 4 * np.finfo(np.float32).eps * gamma


def test_activations_are_those_of_bitnet():
    x = np.random.default_rng(1).normal(size=(5, 32)).astype(np.float32)
    spec = QuantSpec(format=formats.INT8_NARROW, granularity=PerToken())
    q = Absmax(spec).freeze(jnp.asarray(x), {})
    for row, codes in zip(x, np.asarray(q.codes()).astype(int) - 128, strict=True):
        v = row.astype(np.float64) * 127 / np.abs(row).max()
        clear = np.abs(v - np.floor(v) - 0.5) > 1e-4  # 127 * eps * 4
        np.testing.assert_array_equal(codes[clear], np.rint(v)[clear])
        assert np.abs(codes).max() == 127


def test_binary_weights_are_those_of_xnor_net():
    w = np.random.default_rng(2).normal(size=(32, 4)).astype(np.float32)
    got = AbsMean(QuantSpec(format=formats.BINARY)).fake_quant(jnp.asarray(w), {})
    expected = np.sign(w) * np.abs(w).mean(0, dtype=np.float64)  # arXiv:1603.05279, Eq. 6
    # Fixed point of 30 - 5 bits, and a few roundings of the mean.
    np.testing.assert_allclose(got, expected, rtol=2.0**-22, atol=np.abs(w).max() * 2.0**-26)


def test_xnor_scales_of_inputs_make_the_product_of_two_scaled_sign_vectors():
    rng = np.random.default_rng(1)
    x, w = (rng.normal(size=shape).astype(np.float32) for shape in ((5, 16), (16, 3)))
    rows = XNOR(QuantSpec(format=formats.BINARY, granularity=PerToken()))
    columns = XNOR(QuantSpec(format=formats.BINARY))
    x_hat = np.asarray(rows.fake_quant(jnp.asarray(x), {}))
    w_hat = np.asarray(columns.fake_quant(jnp.asarray(w), {}))
    for i in range(5):
        for j in range(3):
            # Eq. 9 of arXiv:1603.05279 for one window: beta alpha sign(x) . sign(w).
            beta, alpha = np.abs(x[i]).mean(), np.abs(w[:, j]).mean()
            signs = sum(
                math.copysign(1, a) * math.copysign(1, b)
                for a, b in zip(x[i], w[:, j], strict=True)
            )
            np.testing.assert_allclose(
                x_hat[i] @ w_hat[:, j], beta * alpha * signs, rtol=1e-5, atol=1e-6
            )


@pytest.mark.parametrize(
    "fmt",
    [formats.TERNARY, formats.INT4, formats.INT8_NARROW, formats.INT2_HALF, formats.BINARY],
    ids=lambda fmt: fmt.name,
)
@pytest.mark.parametrize("s", [0.5, 0.3])
def test_lsq_gradients_are_those_of_the_paper(fmt, s):
    x = np.float32([-900, -9, -1, -0.26, 0, 0.24, 0.5, 0.7, 9])
    g = np.linspace(-1, 1, x.size, dtype=np.float32)
    dx, ds, scale = np.zeros_like(x), 0.0, np.float32(s)
    table = np.arange(fmt.qmin, fmt.qmax + 1, fmt.step)
    for i, v in enumerate(x.astype(np.float64) / scale):  # Eqs. 3 and 5 of arXiv:1902.08153
        inside = fmt.qmin < v < fmt.qmax
        dx[i] = g[i] if inside else 0.0
        nearest = table[np.argmin(np.abs(table - v) - 1e-9 * (table > v))]  # ties: see the inputs
        if fmt.step == 1 and fmt.qmin % 1 == 0:
            nearest = round(v)
        ds += g[i] * (nearest - v if inside else np.clip(v, fmt.qmin, fmt.qmax))
    _, vjp = jax.vjp(lambda x, s: lsq(x, s, fmt), jnp.asarray(x), jnp.full((1,), scale))
    got_dx, got_ds = vjp(jnp.asarray(g))
    np.testing.assert_array_equal(got_dx, dx)
    # A sum of 9 float32 products of at most 128 in magnitude.
    np.testing.assert_allclose(got_ds, [ds], rtol=1e-6, atol=9 * 128 * 2.0**-23)


def test_lsq_scales_the_gradient_of_the_scale_by_section_2_2():
    w = jnp.asarray(np.random.default_rng(3).normal(size=(16, 2)).astype(np.float32))
    spec = QuantSpec(format=formats.INT4)
    plain, scaled = (LSQ(spec, start="absmax", gradient_scale=on) for on in (False, True))
    state = plain.init(w)

    def loss(quantizer):
        return jax.grad(lambda s: jnp.sum(quantizer.fake_quant(w, s) ** 2))(state)["scale"]

    # g = 1 / sqrt(N_W Q_P): 16 weights share a scale, Q_P = 7.
    np.testing.assert_allclose(loss(scaled), loss(plain) / np.float32(np.sqrt(16 * 7)), rtol=1e-6)


def test_lsq_starts_at_the_papers_step_on_request():
    w = np.random.default_rng(4).normal(size=(64, 2)).astype(np.float32)
    state = LSQ(QuantSpec(format=formats.INT4), start="paper").init(jnp.asarray(w))
    expected = 2 * np.abs(w).mean(0, dtype=np.float64) / np.sqrt(7)
    np.testing.assert_allclose(state["scale"][0], expected, rtol=1e-6)
