"""Every transform of a block keeps its function, whatever the variant of the block."""

import dataclasses

import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from lowbit_jax.models.wiring import Link, Wiring
from lowbit_jax.ptq.transforms import (
    AWQScale,
    CrossLayerEqualization,
    OutlierSuppression,
    SmoothQuant,
)
from lowbit_jax.ptq.transforms.folding import fold_scale, links_of, to_source, to_target
from lowbit_jax.walk import layers

VARIANTS = {
    "plain": {},
    "biased": {"qkv_bias": True, "qk_norm": True},
    "sub_norm": {"sub_norm": True},
}
# Searches compile a program a link: one variant each, and those of AWQ are shared with its tests.
CASES = [
    *(("smoothquant", variant) for variant in VARIANTS),
    ("equalization", "plain"),
    ("equalization", "biased"),
    ("awq", "plain"),
    ("outliers", "biased"),
]
TRANSFORMS = {
    "smoothquant": (SmoothQuant(links="all"), "w8a8"),
    "awq": (AWQScale(), "w3a16_asym"),
    "outliers": (OutlierSuppression(grid=3), "w4a4"),
    "equalization": (CrossLayerEqualization(passes=2), "w4a16"),
}


@pytest.mark.parametrize(("name", "variant"), CASES)
def test_a_transformed_block_computes_the_same(bench, assert_same_function, name, variant):
    stage, preset = TRANSFORMS[name]
    work = bench.block(bench.decoder(**VARIANTS[variant]), preset)
    before, kernel = work.chain.outputs(work.original)[0], work.matrix("attention/out")
    stage.block(work)
    assert_same_function(before, work.chain.outputs(work.original)[0])
    assert not np.allclose(kernel, work.matrix("attention/out"))  # it did something


def test_a_scale_goes_through_each_link_alone(bench, assert_same_function):
    work = bench.block(bench.decoder(qkv_bias=True))
    before = work.chain.outputs(work.original)[0]
    links = links_of(work, "test", "all")
    assert [link.source for link in links] == [
        "attention_norm",
        "mlp_norm",
        "attention/value",
        "mlp/up",
    ]
    for link in links:
        block = nnx.clone(work.original)
        source = dict(layers(block))[link.source]
        width = getattr(source, "bias", None) or source.scale if "norm" in link.source else None
        width = source.out_features if width is None else width.shape[0]
        fold_scale(block, link, jnp.linspace(0.5, 2.0, width))
        assert_same_function(before, work.chain.outputs(block)[0])


def test_repeats_stand_side_by_side():
    """Feature (group g, i) of the source is (g * repeats + r, i) of the target, for every r."""
    link = Link("value", ("out",), repeats=3, group=2)
    target = to_target(jnp.arange(4.0), link)
    np.testing.assert_array_equal(target, [0, 1, 0, 1, 0, 1, 2, 3, 2, 3, 2, 3])
    varied = target + jnp.repeat(jnp.arange(6.0), 2)
    np.testing.assert_array_equal(to_source(varied, link, "max"), [2, 3, 7, 8])
    np.testing.assert_array_equal(to_source(target, link, "mean"), jnp.arange(4.0))


def test_the_block_that_was_given_is_left_alone(bench):
    model = bench.decoder()
    work = bench.block(model)
    before = np.asarray(model.layers[0].attention_norm.scale[...])
    SmoothQuant().block(work)
    np.testing.assert_array_equal(model.layers[0].attention_norm.scale[...], before)
    assert work.original is not model.layers[0]


def test_a_model_without_a_wiring_is_told_where_to_give_one(bench):
    work = dataclasses.replace(bench.block(bench.decoder()), wiring=None)
    with pytest.raises(ValueError, match=r"SmoothQuant: .* Pass its table: .*wiring=Wiring"):
        SmoothQuant().block(work)


def test_a_wiring_of_another_model_is_refused_by_path(bench):
    wiring = Wiring(links=(Link("input_layernorm", ("q_proj",)),))
    work = dataclasses.replace(bench.block(bench.decoder()), wiring=wiring)
    with pytest.raises(ValueError, match=r"names 'input_layernorm', which block has not"):
        AWQScale().block(work)


def test_a_norm_without_scale_takes_none(bench):
    model = bench.decoder()
    norm = model.layers[0].mlp_norm
    norm.scale = nnx.data(None)
    with pytest.raises(NotImplementedError, match=r"mlp_norm: this norm has no scale"):
        SmoothQuant().block(bench.block(model))


@pytest.mark.parametrize(
    "make",
    [
        lambda: SmoothQuant(alpha=1.5),
        lambda: SmoothQuant(links="some"),
        lambda: AWQScale(grid=0),
        lambda: OutlierSuppression(grid=0),
        lambda: CrossLayerEqualization(passes=0),
    ],
)
def test_wrong_settings_are_refused(make):
    with pytest.raises(ValueError, match=r"\(|links"):
        make()
