import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import lowbit_jax as lb
from lowbit_jax.ptq.sensitivity import _loss, _rounded, mean_kl, sensitivity


class Block(nnx.Module):
    def __init__(self, rngs):
        self.up = nnx.Linear(8, 8, use_bias=False, rngs=rngs)
        self.down = nnx.Linear(8, 8, use_bias=False, rngs=rngs)

    def __call__(self, x):
        return x + self.down(jnp.tanh(self.up(x)))


class Model(nnx.Module):
    def __init__(self, rngs):
        self.layers = nnx.List([Block(rngs), Block(rngs)])
        self.head = nnx.Linear(8, 16, use_bias=False, rngs=rngs)

    def __call__(self, x):
        for layer in self.layers:
            x = layer(x)
        return self.head(x)


@pytest.fixture(scope="module")
def model():
    return Model(nnx.Rngs(0))


@pytest.fixture(scope="module")
def batches():
    return [jax.random.normal(jax.random.key(i), (3 + i, 8)) for i in range(2)]


def kl(p, q):
    """Mean KL of softmaxes, in float64."""
    p, q = (np.asarray(x, np.float64) for x in (p, q))
    log_p, log_q = (x - np.log(np.exp(x).sum(-1, keepdims=True)) for x in (p, q))
    return np.mean(np.sum(np.exp(log_p) * (log_p - log_q), -1))


def test_mean_kl_is_that_of_the_definition():
    p, q = (jax.random.normal(jax.random.key(i), (4, 5)) for i in (0, 1))
    # Sums of five float32 terms of magnitude about one.
    np.testing.assert_allclose(mean_kl(p, q), kl(p, q), atol=1e-6)
    assert mean_kl(p, p) == 0


def test_each_layer_is_rounded_alone_and_the_rest_stays_float(model, batches):
    found = sensitivity(model, batches, ("w3a16",))
    for row in found.rows:
        changed = nnx.clone(model)
        *_, name = row.path.split("/")
        layer = getattr(changed.layers[int(row.path.split("/")[1])], name)
        kernel = layer.kernel[...]
        spec = lb.presets["w3a16"].weight.spec
        range_ = lb.calibrate.mse(kernel, spec, norm=2.4)
        q = lb.quantize(kernel, spec, scale=range_.scale, zero_point=range_.zero_point)
        layer.kernel[...] = q.dequantize()
        x = np.concatenate(batches)
        # A KL of about 1e-3 is a difference of float32 logarithms of about 3: eps times that.
        np.testing.assert_allclose(row.harm["w3a16"], kl(model(x), changed(x)), atol=3e-6)


def test_rows_are_sorted_and_fewer_bits_hurt_more(model, batches):
    found = sensitivity(model, batches)
    assert {row.path for row in found.rows} == {
        f"layers/{i}/{name}" for i in (0, 1) for name in ("up", "down")
    }
    most = [row.most for row in found.rows]
    assert most == sorted(most, reverse=True)
    for row in found.rows:
        assert row.harm["w4a16"] < row.harm["w3a16"] < row.harm["w2a16"]
    assert found.to_dict() == {row.path: row.harm for row in found.rows}


def test_all_layers_share_one_program_and_the_model_is_untouched(model, batches):
    before = [np.array(x) for x in jax.tree.leaves(nnx.state(model))]
    _loss.clear_cache()
    sensitivity(model, batches[:1], ("w4a16", "w2a16"))
    assert _loss._cache_size() == 1
    after = jax.tree.leaves(nnx.state(model))
    assert all(np.array_equal(x, y) for x, y in zip(before, after, strict=True))


def test_printing_gives_a_table(model, batches):
    lines = str(sensitivity(model, batches[:1], ("w4a16", "w2a16"), include=("head",))).splitlines()
    assert lines[0].split() == ["layer", "w4a16", "w2a16"]
    assert len(lines) == 2 + 5
    assert any(line.startswith("head ") for line in lines)


def test_a_loss_and_a_forward_of_ones_own(model, batches):
    def forward(model, batch):
        return model(2 * batch)

    def squared(y, y_hat):
        return jnp.mean((y - y_hat) ** 2)

    seen = []
    found = sensitivity(
        model,
        batches[:1],
        ("w2a16",),
        forward=forward,
        loss=squared,
        on_layer=lambda done, total: seen.append((done, total)),
    )
    assert seen == [(1, 4), (2, 4), (3, 4), (4, 4)]
    changed = nnx.clone(model)
    path = found.rows[0].path.split("/")
    spec = lb.presets["w2a16"].weight.spec
    layer = getattr(changed.layers[int(path[1])], path[2])
    layer.kernel[...] = _rounded(layer.kernel[...], spec)
    expected = np.mean((model(2 * batches[0]) - changed(2 * batches[0])) ** 2)
    # Means over 48 float32 squares, fused differently.
    np.testing.assert_allclose(found.rows[0].harm["w2a16"], expected, rtol=1e-4)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"batches": []}, "at least one batch"),
        ({"schemes": ()}, "one scheme"),
        ({"schemes": ("w5a16",)}, "no preset is named 'w5a16'"),
        ({"schemes": ("w4a16_g32",)}, r"layers/0/down: .*8"),
        ({"blocks": r"blocks/\d+"}, "matches no module"),
        ({"include": ("hed",)}, "include='hed'"),
    ],
)
def test_wrong_arguments_are_named(model, batches, arguments, message):
    with pytest.raises(ValueError, match=message):
        sensitivity(model, **{"batches": batches} | arguments)


def test_outputs_that_are_not_finite_name_the_layer(model):
    with pytest.raises(FloatingPointError, match=r"layers/0/.*, w4a16: .*not finite"):
        sensitivity(model, [jnp.full((2, 8), jnp.nan)], ("w4a16",))
