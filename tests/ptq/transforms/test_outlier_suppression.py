"""Outlier Suppression+: channels end up centred and bounded, and the threshold pays."""

import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from lowbit_jax.models.wiring import Link, Wiring
from lowbit_jax.presets import presets
from lowbit_jax.ptq.chain import Chain, Rest
from lowbit_jax.ptq.taps import fold
from lowbit_jax.ptq.transforms import OutlierSuppression
from lowbit_jax.ptq.transforms.search import Candidates, output_errors
from lowbit_jax.scheme import LayerScheme


class Normed(nnx.Module):
    """A LayerNorm and a linear layer without a bias."""

    def __init__(self):
        self.norm = nnx.LayerNorm(8, rngs=nnx.Rngs(0))
        self.linear = nnx.Linear(8, 6, use_bias=False, rngs=nnx.Rngs(1))

    def __call__(self, x):
        return self.linear(self.norm(x))


WIRING = Wiring(links=(Link("norm", ("linear",)),))


@pytest.fixture
def work(bench):
    """Channel 0 far off zero, channel 1 far wider than the others."""
    block = Normed()
    block.norm.bias[...] = jnp.zeros(8).at[0].set(20.0)
    block.norm.scale[...] = jnp.ones(8).at[1].set(15.0)
    x = jnp.asarray(np.random.default_rng(0).normal(size=(2, 16, 8)), jnp.float32)
    chain = Chain([x], [Rest.of((), {})])
    work = bench.work(block, chain, WIRING, "w4a4")
    # Zero points: symmetric ranges would put every largest weight on a tie of its rounding.
    scheme = LayerScheme(weight=presets["w4a16_asym"].weight, input=presets["w4a4"].input)
    work.schemes["linear"] = scheme
    return work


def inputs(work):
    rows = fold(work.original, work.chain, ["linear"], lambda rows, _: rows, None)
    return np.asarray(rows["linear"])


def test_shift_and_scale_are_those_of_the_paper(bench, work, assert_same_function):
    before, x = work.chain.outputs(work.original)[0], inputs(work)
    OutlierSuppression(grid=20).block(work)
    [(_, figures)] = bench.notes
    assert_same_function(before, work.chain.outputs(work.original)[0])
    middle = (x.max(0) + x.min(0)) / 2
    scale = np.maximum(1, (x.max(0) - x.min(0)) / 2 / figures["threshold"])
    # Channel 0 loses its offset of 20 in float32: 20 * 2^-23, some ten times.
    np.testing.assert_allclose(inputs(work), (x - middle) / scale, rtol=0, atol=3e-5)
    assert figures["shifted"]
    assert scale.max() > 2  # the search did not stop at no scale at all


def test_the_threshold_is_the_best_of_the_grid(work, bench):
    x = inputs(work)
    shift, extent = (x.max(0) + x.min(0)) / 2, (x.max(0) - x.min(0)) / 2
    thresholds = extent.max() * (1 - np.arange(20) / 20)
    scales = np.maximum(1, extent[None, :] / thresholds[:, None])
    candidates = Candidates(jnp.float32(scales), jnp.float32(shift))
    errors = output_errors(work, WIRING.links[0], candidates, activations=True)

    kernel = np.asarray(work.matrix("linear"), np.float64)
    expected = []
    for s in scales:
        y, w = (x - shift) / s, kernel * s[:, None]
        step = np.abs(y).max(1, keepdims=True) / 7  # narrow int4, per token
        y_hat = np.clip(np.round(y / step), -7, 7) * step
        low, high = np.minimum(w.min(0), 0)[None], np.maximum(w.max(0), 0)[None]
        step = (high - low) / 15  # uint4, per channel
        zero = np.round(-low / step)
        w_hat = (np.clip(np.round(w / step) + zero, 0, 15) - zero) * step
        expected.append(((y_hat @ w_hat + shift @ kernel - x @ kernel) ** 2).mean())
    # A code next to a tie may fall either way in float32; one of 304 moves the mean by this much.
    np.testing.assert_allclose(errors, expected, rtol=0.01)
    assert errors.min() < 0.9 * errors[0]
    OutlierSuppression(grid=20).block(work)
    assert bench.notes[0][1]["threshold"] == pytest.approx(thresholds[np.argmin(errors)], rel=1e-5)


def test_channels_behind_an_rms_norm_are_scaled_only_and_it_says_so(bench):
    work = bench.block(bench.decoder(qkv_bias=True), "w4a4")
    OutlierSuppression(grid=3, links="norms").block(work)
    messages = [figures["message"] for _, figures in bench.notes if "message" in figures]
    assert len(messages) == 2
    assert all("RMSNorm, which has no bias to take the shift" in m for m in messages)
    assert work.layer("mlp/up").bias is None
