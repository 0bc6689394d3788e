"""SmoothQuant against Eq. 4 of its paper."""

import numpy as np
import pytest

from lowbit_jax.ptq.layers import get_matrix
from lowbit_jax.ptq.stage import BlockWork
from lowbit_jax.ptq.taps import fold
from lowbit_jax.ptq.transforms import SmoothQuant
from lowbit_jax.walk import layers


def inputs(work: BlockWork, path: str) -> np.ndarray:
    return np.asarray(fold(work.original, work.chain, [path], _rows, None)[path], np.float64)


def _rows(rows, carry):
    return rows


@pytest.mark.parametrize("alpha", [0.5, 0.8])
def test_scales_are_those_of_equation_4(bench, alpha):
    work = bench.block(bench.decoder(), "w8a8")
    before = dict(layers(work.original))
    x = inputs(work, "mlp/gate")
    matrices = [np.asarray(work.matrix(p), np.float64) for p in ("mlp/gate", "mlp/up")]
    SmoothQuant(alpha=alpha).block(work)
    after = dict(layers(work.original))

    expected = np.empty(x.shape[1])
    for j in range(x.shape[1]):
        weight = max(abs(w[j]).max() for w in matrices)
        expected[j] = abs(x[:, j]).max() ** alpha / weight ** (1 - alpha)
    # A dozen float32 operations from input to scale.
    got = np.asarray(before["mlp_norm"].scale[...] / after["mlp_norm"].scale[...])
    np.testing.assert_allclose(got, expected, rtol=1e-5)
    got = np.asarray(work.matrix("mlp/up") / get_matrix(before["mlp/up"]))
    np.testing.assert_allclose(got, np.repeat(expected[:, None], 24, axis=1), rtol=1e-5)


def test_repeated_values_share_one_scale(bench):
    work = bench.block(bench.decoder(), "w8a8")
    x = np.abs(inputs(work, "attention/out")).max(0).reshape(2, 2, 4).max(1).reshape(-1)
    weight = np.abs(np.asarray(work.matrix("attention/out"))).max(1).reshape(2, 2, 4)
    expected = np.sqrt(x / weight.max(1).reshape(-1))
    before = np.asarray(work.matrix("attention/value"))
    SmoothQuant(links="all").block(work)
    # The norm in front of `value` moved its rows, so that only ratios between columns compare.
    moved = before / np.asarray(work.matrix("attention/value"))
    ratio = moved / moved[:, :1]
    np.testing.assert_allclose(ratio[0], expected / expected[0], rtol=1e-5)


def test_a_feature_that_never_comes_keeps_its_scale(bench):
    model = bench.decoder()
    norm = model.layers[0].mlp_norm
    norm.scale[...] = norm.scale[...].at[3].set(0.0)
    work = bench.block(model, "w8a8")
    row = work.matrix("mlp/up")[3]
    SmoothQuant().block(work)
    np.testing.assert_array_equal(work.matrix("mlp/up")[3], row)
    assert np.isfinite(np.asarray(work.chain.outputs(work.original)[0])).all()
