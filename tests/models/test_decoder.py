"""The decoder computes the Llama family's function, in every form in which it is offered."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from lowbit_jax.models import Decoder, DecoderConfig

EPS = np.finfo(np.float32).eps
PLAIN = DecoderConfig(vocab=31, dim=16, layers=2, heads=4, kv_heads=2, ffn_dim=24, max_length=12)
FULL = dataclasses.replace(
    PLAIN, tied=True, qkv_bias=True, qk_norm=True, sub_norm=True, head_dim=6, kv_heads=1
)
# What Gemma 2 and 3 do otherwise, all at once; kv_heads=2 so that softcapped scores are grouped.
GEMMA = dataclasses.replace(
    PLAIN,
    tied=True,
    qk_norm=True,
    activation="gelu_tanh",
    embed_scale=3.0,
    post_norm=True,
    query_scale=0.7,
    attention_softcap=1.5,
    logit_softcap=2.5,
    windows=(3, 0),
    rope_factors=(1.0, 8.0),
    local_rope_theta=100.0,
)
TOKENS = jnp.asarray(np.random.default_rng(7).integers(0, PLAIN.vocab, (2, 9)), jnp.int32)

forward = jax.jit(lambda model, tokens: model(tokens))
step = jax.jit(lambda model, cache, tokens: (model(tokens, cache), cache))


def rounding(config: DecoderConfig, logits: np.ndarray) -> float:
    """First-order bound: products of K terms err by K * eps; 7 a layer and the head add up."""
    k = max(config.dim, config.ffn_dim, config.heads * config.head_size)
    return (7 * config.layers + 1) * k * EPS * float(np.max(np.abs(logits)))


def reference(
    model: Decoder, tokens: np.ndarray, config: DecoderConfig | None = None
) -> np.ndarray:
    """The Llama family's forward pass in float64, one head and one position at a time."""
    c = config or model.config
    p = jax.tree.map(np.float64, nnx.to_pure_dict(nnx.state(model)))

    def norm(x, scale):
        return x / np.sqrt(np.mean(x**2, -1, keepdims=True) + c.norm_eps) * scale["scale"]

    def linear(x, layer):
        return x @ layer["kernel"] + layer.get("bias", 0.0)

    def rotate(x, position, window):  # x cos + rotate_half(x) sin, the form of Hugging Face
        local = window and c.local_rope_theta
        angle = position * (local or c.rope_theta) ** (-np.arange(0, x.size, 2) / x.size)
        angle = angle / (1.0 if local or not c.rope_factors else np.array(c.rope_factors))
        cos, sin = np.cos(np.tile(angle, 2)), np.sin(np.tile(angle, 2))
        return x * cos + np.concatenate([-x[x.size // 2 :], x[: x.size // 2]]) * sin

    def capped(x, cap):
        return x if cap is None else cap * np.tanh(x / cap)

    def attention(x, a, window):
        length, d = len(x), c.head_size
        q = linear(x, a["query"]).reshape(length, c.heads, d)
        k = linear(x, a["key"]).reshape(length, c.kv_heads, d)
        v = linear(x, a["value"]).reshape(length, c.kv_heads, d)
        if c.qk_norm:
            q, k = norm(q, a["query_norm"]), norm(k, a["key_norm"])
        y = np.zeros((length, c.heads, d))
        for h in range(c.heads):
            g = h // (c.heads // c.kv_heads)
            for t in range(length):
                query, first = rotate(q[t, h], t, window), max(0, t + 1 - window) if window else 0
                score = [query @ rotate(k[s, g], s, window) for s in range(first, t + 1)]
                score = capped(np.array(score) * (c.query_scale or d**-0.5), c.attention_softcap)
                weight = np.exp(score) / np.sum(np.exp(score))
                y[t, h] = weight @ v[first : t + 1, g]
        y = y.reshape(length, c.heads * d)
        return linear(norm(y, a["out_norm"]) if c.sub_norm else y, a["out"])

    def mlp(x, m):
        gate = linear(x, m["gate"])
        if c.activation == "silu":
            gate = gate / (1 + np.exp(-gate))
        else:  # the approximation of GELU in arXiv:1606.08415
            gate = gate / 2 * (1 + np.tanh(np.sqrt(2 / np.pi) * (gate + 0.044715 * gate**3)))
        y = gate * linear(x, m["up"])
        return linear(norm(y, m["down_norm"]) if c.sub_norm else y, m["down"])

    logits = []
    for sequence in tokens:
        x = p["embed"]["embedding"][sequence] * c.embed_scale
        for i in range(c.layers):
            layer = p["layers"][i]
            window = c.windows[i] if c.windows else 0
            y = attention(norm(x, layer["attention_norm"]), layer["attention"], window)
            x = x + (norm(y, layer["attention_post_norm"]) if c.post_norm else y)
            y = mlp(norm(x, layer["mlp_norm"]), layer["mlp"])
            x = x + (norm(y, layer["mlp_post_norm"]) if c.post_norm else y)
        x = norm(x, p["norm"])
        logits.append(x @ p["embed"]["embedding"].T if c.tied else linear(x, p["head"]))
    return capped(np.stack(logits), c.logit_softcap)


@pytest.fixture(scope="module")
def make(draw_model):
    """Makes a random model, the same for `stacked` and not."""

    def make(config: DecoderConfig, **changes) -> Decoder:
        config = dataclasses.replace(config, **changes)
        listed = dataclasses.replace(config, stacked=False)
        model = draw_model(lambda: Decoder(listed, rngs=nnx.Rngs(0)))
        if not config.stacked:
            return model
        state = nnx.state(model)
        layers = [state["layers"][i] for i in range(config.layers)]
        state["layers"] = jax.tree.map(lambda *leaves: np.stack(leaves), *layers)
        abstract = nnx.eval_shape(lambda: Decoder(config, rngs=nnx.Rngs(0)))
        return nnx.merge(nnx.graphdef(abstract), jax.device_put(state))

    return make


@pytest.fixture(scope="module")
def plain(make) -> Decoder:
    return make(PLAIN)


@pytest.fixture(scope="module")
def full(make) -> Decoder:
    return make(FULL)


@pytest.fixture(scope="module")
def gemma(make) -> Decoder:
    return make(GEMMA)


@pytest.fixture(scope="module")
def stacked(make) -> Decoder:
    return make(FULL, stacked=True)


@pytest.mark.parametrize("name", ["plain", "full", "gemma"])
def test_logits_are_those_of_the_llama_family(name, request):
    model = request.getfixturevalue(name)
    want = reference(model, np.asarray(TOKENS))
    got = forward(model, TOKENS)
    assert got.dtype == jnp.float32
    np.testing.assert_allclose(got, want, rtol=0, atol=rounding(model.config, want))


def test_stacked_layers_compute_the_same(full, stacked):
    def loss(model):
        logits = model(TOKENS)
        return jnp.mean(jax.nn.logsumexp(logits, axis=-1)), logits

    differentiate = nnx.jit(nnx.grad(loss, has_aux=True))
    (want, want_logits), (got, got_logits) = differentiate(full), differentiate(stacked)
    atol = 2 * rounding(FULL, want_logits)
    np.testing.assert_allclose(got_logits, want_logits, rtol=0, atol=atol)

    want, got = nnx.to_pure_dict(want), nnx.to_pure_dict(got)
    layers = [want["layers"][i] for i in range(FULL.layers)]
    want["layers"] = jax.tree.map(lambda *leaves: np.stack(leaves), *layers)
    # Backward has twice the products of forward; every gradient of this mean is below 1.
    atol = 2 * 2 * rounding(FULL, np.ones(1))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=0, atol=atol), got, want)

    still = [path for path, g in jax.tree.leaves_with_path(want) if not np.any(np.asarray(g))]
    assert still == [], "parameters that take no part"


def test_the_same_seed_gives_the_same_weights_stacked_or_not():
    config = dataclasses.replace(PLAIN, vocab=64, dim=64, kv_heads=4, ffn_dim=128)
    model = Decoder(config, rngs=nnx.Rngs(0))
    stacked = Decoder(dataclasses.replace(config, stacked=True), rngs=nnx.Rngs(0))
    for i, layer in enumerate(model.layers):
        jax.tree.map(
            lambda one, all_of_them, i=i: np.testing.assert_array_equal(one, all_of_them[i]),
            nnx.to_pure_dict(nnx.state(layer)),
            nnx.to_pure_dict(nnx.state(stacked.layers)),
        )
    np.testing.assert_array_equal(model.embed.embedding[...], stacked.embed.embedding[...])

    layer = model.layers[1]
    spreads = {
        "embed": (model.embed.embedding, 0.02),
        "up": (layer.mlp.up.kernel, 64**-0.5),
        "out": (layer.attention.out.kernel, 64**-0.5 / np.sqrt(2 * config.layers)),
        "down": (layer.mlp.down.kernel, 128**-0.5 / np.sqrt(2 * config.layers)),
    }
    for name, (kernel, std) in spreads.items():
        # The standard error of a standard deviation is std / sqrt(2 n); five of them.
        error = abs(np.std(np.asarray(kernel[...])) / std - 1)
        assert error < 5 / np.sqrt(2 * kernel.size), name


@pytest.mark.parametrize("form", ["full", "stacked", "gemma"])
def test_a_cached_context_gives_the_logits_of_the_whole(form, full, request):
    model = request.getfixturevalue(form)
    full = model if form == "gemma" else full
    cache, got, start = model.init_cache(2, PLAIN.max_length), [], 0
    for length in (4, 1, 4):
        logits, cache = step(model, cache, TOKENS[:, start : start + length])
        got.append(logits)
        start += length
    want = forward(full, TOKENS)
    # Each of the two computations is within the bound of the exact value.
    np.testing.assert_allclose(
        np.concatenate(got, axis=1), want, rtol=0, atol=2 * rounding(FULL, want)
    )


@pytest.mark.parametrize("form", ["full", "stacked"])
def test_a_cache_written_past_its_end_answers_nan_and_not_something_plausible(form, request):
    model = request.getfixturevalue(form)
    cache = model.init_cache(2, PLAIN.max_length)
    for _ in range(PLAIN.max_length // 4):
        logits, cache = step(model, cache, TOKENS[:, :4])
        assert np.all(np.isfinite(logits))
    logits, _ = step(model, cache, TOKENS[:, :1])
    assert np.all(np.isnan(logits))


def test_no_token_sees_a_later_one(plain):
    changed = np.array(TOKENS)
    changed[:, 5] = (changed[:, 5] + 1) % PLAIN.vocab
    before = np.asarray(forward(plain, TOKENS))
    after = np.asarray(forward(plain, jnp.asarray(changed)))
    # Masked weights are exactly 0, so that what they multiply cannot even show in the last bit.
    np.testing.assert_array_equal(before[:, :5], after[:, :5])
    assert np.all(np.any(before[:, 5:] != after[:, 5:], axis=-1))


def test_bfloat16_computes_the_same_up_to_its_rounding(plain, make):
    model = make(PLAIN, dtype="bfloat16")
    assert {p.dtype for p in jax.tree.leaves(nnx.state(model))} == {jnp.dtype(jnp.float32)}
    want, got = forward(plain, TOKENS), forward(model, TOKENS)
    assert got.dtype == jnp.float32
    assert nnx.eval_shape(lambda: model.features(TOKENS)).dtype == jnp.bfloat16
    # 7 products a layer and the head each round their result to 8 bits: by half a unit, 2**-9.
    error = (7 * PLAIN.layers + 1) * 2**-9 * float(jnp.max(jnp.abs(want)))
    np.testing.assert_allclose(got, want, rtol=0, atol=error)
    assert np.any(np.asarray(got != want))


def test_paths_are_the_contract(full, make):
    def paths(model):
        return {"/".join(map(str, path)) for path, _ in nnx.to_flat_state(nnx.state(model))}

    layer = {
        *("attention_norm/scale", "mlp_norm/scale"),
        *(f"attention/{name}/kernel" for name in ("query", "key", "value", "out")),
        *(f"mlp/{name}/kernel" for name in ("gate", "up", "down")),
    }
    options = {
        *(f"attention/{name}/bias" for name in ("query", "key", "value")),
        *(f"attention/{name}/scale" for name in ("query_norm", "key_norm", "out_norm")),
        "mlp/down_norm/scale",
    }
    shared = {"embed/embedding", "norm/scale"}
    layers = {f"layers/{i}/{name}" for i in range(2) for name in layer | options}
    assert paths(full) == shared | layers
    stacked = make(PLAIN, stacked=True)
    assert paths(stacked) == shared | {f"layers/{name}" for name in layer} | {"head/kernel"}
    assert {p.shape[0] for p in jax.tree.leaves(nnx.state(stacked.layers))} == {PLAIN.layers}


class Counting(nnx.Module):
    """A twin that notes the largest input it has seen, as calibration does."""

    def __init__(self, inner: nnx.Linear, stack: tuple[int, ...] = ()):
        self.inner = inner
        self.largest = nnx.Variable(jnp.zeros(stack))

    def __call__(self, x):
        self.largest[...] = jnp.maximum(self.largest[...], jnp.max(jnp.abs(x)))
        return self.inner(x)


def test_what_a_swapped_layer_observes_is_kept_for_each_layer_of_a_stack(make):
    listed, stacked = make(PLAIN), make(PLAIN, stacked=True)
    for layer in listed.layers:
        layer.mlp.down = Counting(layer.mlp.down)
    stacked.layers.mlp.down = Counting(stacked.layers.mlp.down, (PLAIN.layers,))
    want, got = [nnx.jit(lambda model: model(TOKENS))(model) for model in (listed, stacked)]
    np.testing.assert_allclose(got, want, rtol=0, atol=rounding(PLAIN, want))
    seen = np.stack([layer.mlp.down.largest[...] for layer in listed.layers])
    assert len(set(seen.tolist())) == PLAIN.layers
    assert np.all(seen > 0)
    np.testing.assert_allclose(
        stacked.layers.mlp.down.largest[...], seen, rtol=0, atol=rounding(PLAIN, seen)
    )


def test_a_stacked_model_may_be_closed_over_by_jit(stacked):
    # Flax raises while tracing where a variable from outside is written to, even its own value.
    assert jax.eval_shape(lambda tokens: stacked(tokens), TOKENS).shape == (*TOKENS.shape, 31)


def test_shapes_come_without_arrays():
    for stacked in (False, True):
        config = dataclasses.replace(PLAIN, stacked=stacked)
        abstract = nnx.eval_shape(lambda c=config: Decoder(c, rngs=nnx.Rngs(0)))
        leaves = jax.tree.leaves(nnx.state(abstract))
        assert leaves
        assert all(isinstance(leaf, jax.ShapeDtypeStruct) for leaf in leaves)


def test_layers_of_one_window_may_be_stacked_and_others_may_not(make):
    windows = {"windows": (3, 3), "attention_softcap": 1.5}
    listed, stacked = make(PLAIN, **windows), make(PLAIN, stacked=True, **windows)
    want = forward(listed, TOKENS)
    got = forward(stacked, TOKENS)
    np.testing.assert_allclose(got, want, rtol=0, atol=2 * rounding(PLAIN, want))
    with pytest.raises(NotImplementedError, match=r"windows=\(3, 0\) differ. Set stacked=False"):
        dataclasses.replace(GEMMA, stacked=True)


def test_the_reference_tells_each_field_of_gemma(gemma):
    """So that a model which left one out would not agree with it."""
    want = reference(gemma, np.asarray(TOKENS))
    off = {
        "activation": "silu",
        "embed_scale": 1.0,
        "query_scale": None,
        "windows": None,
        "attention_softcap": None,
        "logit_softcap": None,
        "rope_factors": None,
        "local_rope_theta": None,
        "post_norm": False,
    }
    for field, value in off.items():
        config = dataclasses.replace(GEMMA, **{field: value})
        difference = np.max(np.abs(reference(gemma, np.asarray(TOKENS), config) - want))
        assert difference > 2 * rounding(GEMMA, want), field


def test_a_context_beyond_max_length_is_an_error_that_names_both(plain):
    with pytest.raises(ValueError, match=r"13 tokens is longer than max_length=12"):
        plain(jnp.zeros((1, 13), jnp.int32))
    with pytest.raises(ValueError, match=r"cache for 13 tokens is longer than max_length=12"):
        plain.init_cache(1, 13)
