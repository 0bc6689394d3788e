"""AWQ's two searches against plain float64 transcriptions of them."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from lowbit_jax.presets import presets
from lowbit_jax.ptq.layers import get_matrix, set_matrix
from lowbit_jax.ptq.stage import LayerProblem
from lowbit_jax.ptq.taps import fold
from lowbit_jax.ptq.transforms import AWQClip, AWQScale
from lowbit_jax.ptq.transforms.search import common_module
from lowbit_jax.walk import layers


def rounded(w: np.ndarray, bits: int, group: int | None = None) -> np.ndarray:
    """Min-max round to nearest of a matrix [K, N], per column or in groups along K."""
    out, group = np.empty_like(w), group or len(w)
    for n in range(w.shape[1]):
        for k in range(0, len(w), group):
            v = w[k : k + group, n]
            low, high = min(v.min(), 0.0), max(v.max(), 0.0)
            scale = (high - low) / (2**bits - 1)
            zero = np.clip(np.round(-low / scale), 0, 2**bits - 1)
            codes = np.clip(np.round(v / scale) + zero, 0, 2**bits - 1)
            out[k : k + group, n] = (codes - zero) * scale
    return out


def search(x, matrices, output, bits, grid):
    """The authors' loop: the scale of the least mean squared error of `output(matrices)`."""
    magnitude, wanted = np.abs(x).mean(0), output(matrices)
    best, least = None, np.inf
    for i in range(grid):
        s = np.maximum(magnitude ** (i / grid), 1e-4)
        s = s / np.sqrt(s.max() * s.min())
        candidate = [rounded(w * s[:, None], bits) / s[:, None] for w in matrices]
        error = ((output(candidate) - wanted) ** 2).mean()
        if error < least:
            best, least = s, error
    return best


def mlp(x, down):
    def output(matrices):
        gate, up = (x @ w for w in matrices)
        return (gate / (1 + np.exp(-gate)) * up) @ down

    return output


def collected(work, path):
    return np.asarray(fold(work.original, work.chain, [path], _rows, None)[path], np.float64)


def _rows(rows, carry):
    return rows


def test_scales_are_those_of_the_authors_search(bench):
    work = bench.block(bench.decoder())
    kernels = {p: np.asarray(work.matrix(p), np.float64) for p in work.schemes}
    before = dict(layers(work.original))
    x, hidden = collected(work, "mlp/gate"), collected(work, "mlp/down")
    gate_up = [kernels["mlp/gate"], kernels["mlp/up"]]
    expected = {
        "mlp_norm": search(x, gate_up, mlp(x, kernels["mlp/down"]), 3, 20),
        "mlp/up": search(hidden, [kernels["mlp/down"]], lambda w: hidden @ w[0], 3, 20),
    }
    AWQScale().block(work)
    after = dict(layers(work.original))
    norm = before["mlp_norm"].scale[...] / after["mlp_norm"].scale[...]
    down = get_matrix(after["mlp/down"])[:, 0] / get_matrix(before["mlp/down"])[:, 0]
    # The same alpha, and a dozen float32 operations from inputs to scales.
    np.testing.assert_allclose(norm, expected["mlp_norm"], rtol=1e-5)
    np.testing.assert_allclose(down, expected["mlp/up"], rtol=1e-5)
    assert np.ptp(expected["mlp_norm"]) > 0  # the search did not stop at alpha = 0
    alphas = {path: figures["alpha"] for path, figures in bench.notes}
    assert set(alphas) == {"attention_norm", "mlp_norm", "attention/value", "mlp/up"}
    assert all(f["error_after"] <= f["error_before"] for _, f in bench.notes)


def test_the_objective_is_the_smallest_module_around_the_layers():
    assert common_module(("attention/query", "attention/key")) == "attention"
    assert common_module(("mlp/down",)) == "mlp/down"
    assert common_module(("gate", "up")) == ""


@pytest.mark.parametrize("group", [None, 4])
def test_clipping_is_that_of_the_authors_search(group):
    rng = np.random.default_rng(0)
    x = rng.normal(size=(40, 8)) * np.geomspace(0.2, 3, 8)
    # Lopsided: a range of -limit .. limit would put every zero point on a tie of its rounding.
    w = np.abs(rng.normal(size=(8, 5))) ** 3 - 0.1
    preset = presets["w3a16_asym"].weight
    spec = preset.spec
    if group:
        spec = presets["w3a16_g32_asym"].weight.spec
        spec = type(spec)(
            format=spec.format, granularity=type(spec.granularity)(group, 1), symmetric=False
        )
    expected, size = np.empty_like(w), group or 8
    for n in range(5):
        for k in range(0, 8, size):
            v, rows = w[k : k + size, n], x[:, k : k + size]
            least = np.inf
            for i in range(10):  # max_shrink .5 of a grid of 20
                limit = abs(v).max() * (1 - i / 20)
                q = rounded(np.clip(v, -limit, limit)[:, None], 3)[:, 0]
                error = ((rows @ q - rows @ v) ** 2).mean()
                if error < least:
                    least, expected[k : k + size, n] = error, q
    problem = LayerProblem(
        "mlp/up",
        jnp.asarray(w, jnp.float32),
        spec,
        preset,
        hessian=jnp.asarray(x.T @ x / 40, jnp.float32),
        tokens=jnp.float32(40),
    )
    got = AWQClip().solve(problem, jax.random.key(0))
    # Scales are float32 here: a few units in the last place of the largest weight.
    np.testing.assert_allclose(got.weight, expected, rtol=0, atol=1e-5 * np.abs(w).max())
    assert got.info["clipped"] > 0


def test_queries_and_keys_are_not_clipped():
    rng = np.random.default_rng(0)
    w = jnp.asarray(rng.normal(size=(8, 5)) ** 3, jnp.float32)
    quantizer = presets["w3a16_asym"].weight
    make = lambda path: LayerProblem(path, w, quantizer.spec, quantizer, hessian=jnp.eye(8))  # noqa: E731
    skipped = AWQClip().solve(make("attention/query"), jax.random.key(0)).weight
    np.testing.assert_allclose(skipped, rounded(np.float64(w), 3), atol=1e-5 * np.abs(w).max())
    clipped = AWQClip().solve(make("attention/value"), jax.random.key(0)).weight
    assert np.abs(clipped).max() < np.abs(skipped).max()


def test_awq_beats_round_to_nearest_on_the_blocks_output(bench):
    """Its claim: with few large activations, protecting what they multiply pays."""
    model = bench.decoder()
    for norm in (model.layers[0].attention_norm, model.layers[0].mlp_norm):
        norm.scale[...] = norm.scale[...].at[:2].mul(12.0)
    work = bench.block(model)
    wanted = work.chain.outputs(work.original)[0]

    def error(block):
        return float(jnp.mean((work.chain.outputs(block)[0] - wanted) ** 2))

    def nearest(block):
        block = nnx.clone(block)
        for path in work.schemes:
            layer = dict(layers(block))[path]
            matrix = np.asarray(get_matrix(layer), np.float64)
            set_matrix(layer, jnp.asarray(rounded(matrix, 3), jnp.float32))
        return error(block)

    before = nearest(work.original)
    AWQScale().block(work)
    assert nearest(work.original) < 0.9 * before


@pytest.mark.parametrize("change", [{"grid": 0}, {"max_shrink": 1.0}, {"max_shrink": 0.0}])
def test_clip_settings_are_checked(change):
    with pytest.raises(ValueError, match="AWQClip"):
        AWQClip(**change)
