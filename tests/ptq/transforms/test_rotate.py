"""QuaRot's rotations: exact on the float function, and what they are for."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from lowbit_jax.models.rotation import Rotated
from lowbit_jax.ptq.chain import capture
from lowbit_jax.ptq.layers import get_matrix
from lowbit_jax.ptq.taps import fold
from lowbit_jax.ptq.transforms import Rotate, SmoothQuant
from lowbit_jax.walk import layers


@functools.partial(jax.jit, static_argnums=0)
def _logits(graphdef, state, tokens):
    return nnx.merge(graphdef, state)(tokens)


def logits(model, tokens):
    return _logits(*nnx.split(model), tokens)


@pytest.mark.parametrize(
    ("stage", "variant"),
    [
        (Rotate(), {}),
        (Rotate(kind="random", seed=3), {"qkv_bias": True, "qk_norm": True}),
        (Rotate(), {"sub_norm": True}),
        (Rotate(heads=False, down=False), {"layers": 2, "head_dim": 6}),
    ],
    ids=["hadamard", "random", "sub_norm", "folded"],
)
def test_a_rotated_model_computes_the_same(bench, assert_same_function, stage, variant):
    model = bench.decoder(**variant)
    rotated = stage.prepare(bench.whole(model))
    tokens = bench.tokens()
    assert_same_function(logits(model, tokens), logits(rotated, tokens))
    norms = [m for p, m in layers(rotated) if p.endswith(("attention_norm", "mlp_norm"))]
    assert all((np.asarray(norm.scale[...]) == 1).all() for norm in norms)
    assert not np.allclose(rotated.embed.embedding[...], model.embed.embedding[...])


def test_a_tied_head_is_untied_only_where_the_last_norm_needs_it(bench, assert_same_function):
    model = bench.decoder(tied=True)
    assert not Rotate().prepare(bench.whole(model)).config.tied
    model.norm.scale[...] = jnp.full_like(model.norm.scale[...], 0.7)
    rotated = Rotate().prepare(bench.whole(model))
    assert rotated.config.tied
    assert_same_function(logits(model, bench.tokens()), logits(rotated, bench.tokens()))


def test_online_rotations_are_modules_and_layers_move_behind_them(bench):
    work = bench.whole(bench.decoder())
    paths, scheme = list(work.schemes), work.schemes["layers/0/mlp/down"]
    rotated = dict(layers(Rotate().prepare(work)))
    moved = {"layers/0/mlp/down", "layers/0/attention/out"}
    assert {path for path, m in rotated.items() if isinstance(m, Rotated)} == moved
    assert list(work.schemes) == [f"{p}/linear" if p in moved else p for p in paths]
    assert work.schemes["layers/0/mlp/down/linear"] is scheme
    assert not bench.messages  # 16, 4, 4 and 24 all have Hadamard matrices


def test_folded_rotations_add_nothing(bench):
    model = bench.decoder()
    rotated = Rotate(heads=False, down=False).prepare(bench.whole(model))
    assert nnx.graphdef(rotated) == nnx.graphdef(model)


def test_a_seed_gives_one_rotation(bench):
    model = bench.decoder()
    a, b, c = (Rotate(seed=s).prepare(bench.whole(model)).embed.embedding[...] for s in (1, 1, 2))
    np.testing.assert_array_equal(a, b)
    assert not np.allclose(a, c)


def test_orders_without_hadamard_matrix_are_announced(bench, assert_same_function):
    model = bench.decoder(ffn_dim=22)
    stage = Rotate(residual=False, values=False, heads=False)
    rotated = stage.prepare(bench.whole(model))
    assert bench.messages == [
        "Rotate: no Hadamard matrix of order 22 is known here; it is a random orthogonal one."
    ]
    x = jax.random.normal(jax.random.key(0), (3, 22))
    assert_same_function(model.layers[0].mlp.down(x), rotated.layers[0].mlp.down(x))


def peak(model, path, tokens):
    """Largest magnitude over root mean square of what enters a layer: 1 is perfectly even."""
    chain = capture(model, ["layers/0"], [tokens], lambda m, x: m(x))
    x = np.asarray(fold(model.layers[0], chain, [path], lambda rows, _: rows, None)[path])
    return (np.abs(x).max(1) / np.sqrt((x**2).mean(1))).mean()


def test_an_outlier_is_spread_over_all_features(bench):
    """16 features of which one holds nearly everything: its peak falls from sqrt(16) = 4 to 1."""
    model = bench.decoder()
    model.embed.embedding[...] = model.embed.embedding[...].at[:, 5].mul(100.0)
    ones = jnp.ones_like(model.layers[0].attention_norm.scale[...])
    model.layers[0].attention_norm.scale[...] = ones
    rotated = Rotate(heads=False, down=False).prepare(bench.whole(model))
    assert peak(model, "attention/query", bench.tokens()) > 3.5
    assert peak(rotated, "attention/query", bench.tokens()) < 1.5


def test_transforms_of_blocks_still_work_behind_it(bench, assert_same_function):
    model = bench.decoder()
    rotated = Rotate().prepare(bench.whole(model))
    work = bench.block(rotated)
    before = work.chain.outputs(work.original)[0]
    kernel = get_matrix(work.layer("mlp/up"))
    SmoothQuant(links="all").block(work)
    assert_same_function(before, work.chain.outputs(work.original)[0])
    assert not np.allclose(kernel, get_matrix(work.layer("mlp/up")))


def test_what_does_not_commute_is_refused(bench):
    model = bench.decoder()
    model.layers[0].mlp_norm = nnx.LayerNorm(16, rngs=nnx.Rngs(0))
    with pytest.raises(NotImplementedError, match=r"layers/0/mlp_norm is a LayerNorm"):
        Rotate().prepare(bench.whole(model))
    with pytest.raises(NotImplementedError, match=r"attention_post_norm .* do not commute"):
        Rotate().prepare(bench.whole(bench.decoder(post_norm=True)))


def test_a_model_without_wiring_or_with_anothers_is_refused(bench):
    work = bench.whole(bench.decoder())
    with pytest.raises(ValueError, match="Rotate: this model does not say"):
        Rotate().prepare(dataclasses.replace(work, wiring=None))
    wiring = dataclasses.replace(work.wiring, readers=(("ln_1", ("c_attn",)),))
    with pytest.raises(ValueError, match="names 'ln_1', which no block"):
        Rotate().prepare(dataclasses.replace(work, wiring=wiring))
    with pytest.raises(ValueError, match="kinds are"):
        Rotate(kind="fourier")
