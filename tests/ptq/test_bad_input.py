"""Calibration that cannot work, or hardly: one clear message, and finished blocks are kept."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import lowbit_jax as lb
from lowbit_jax import ptq

EXPERTS, TOKENS, DIM = 3, 16, 4


class ExpertBlock(nnx.Module):
    """Experts that take a fixed share of the tokens each, zeros where a token is not theirs."""

    def __init__(self, rngs, tokens):
        self.experts = nnx.Einsum("etd,edf->etf", (EXPERTS, DIM, DIM), rngs=rngs)
        self.tokens = tokens

    def __call__(self, x):
        first = jnp.cumsum(jnp.array(self.tokens)) - jnp.array(self.tokens)
        place = jnp.arange(TOKENS)[None] - first[:, None]
        mine = (place >= 0) & (place < jnp.array(self.tokens)[:, None])
        return jnp.sum(self.experts(jnp.where(mine[..., None], x[None, 0], 0)), axis=0)[None]


class Chain(nnx.Module):
    def __init__(self, *blocks):
        self.layers = nnx.List(blocks)

    def __call__(self, x):
        for layer in self.layers:
            x = layer(x)
        return x


class HalfUsed(nnx.Module):
    def __init__(self, rngs):
        self.used, self.unused = (nnx.Linear(DIM, DIM, rngs=rngs) for _ in range(2))

    def __call__(self, x):
        return self.used(x)


@pytest.fixture
def rows():
    return jax.random.normal(jax.random.key(0), (1, TOKENS, DIM))


@pytest.mark.parametrize(("tokens", "starved", "got"), [((8, 2, 6), 1, 2), ((9, 7, 0), 2, 0)])
def test_an_expert_with_too_few_tokens_is_named(rows, tokens, starved, got):
    model = Chain(ExpertBlock(nnx.Rngs(0), tokens))
    message = rf"experts \(stack entry {starved}\): calibration gave it {got} tokens, fewer"
    with pytest.raises(ValueError, match=message):
        ptq.run(model, "w4a16", [rows], [ptq.GPTQ()])


def test_an_expert_with_few_tokens_is_no_matter_to_what_needs_no_data(rows):
    model = Chain(ExpertBlock(nnx.Rngs(0), (8, 2, 6)))
    quantized, _ = ptq.run(model, "w4a16", [rows], [ptq.HQQ()])
    assert jnp.isfinite(quantized(rows)).all()


@pytest.mark.parametrize("solver", [ptq.GPTQ(), ptq.BRECQ(steps=2), ptq.AWQClip()])
def test_a_layer_that_never_saw_an_input_is_named_before_it_is_solved(rows, solver):
    model = Chain(HalfUsed(nnx.Rngs(0)))
    with pytest.raises(ValueError, match="unused: this layer never saw an input"):
        ptq.run(model, "w4a16", [rows], [solver])


def test_nan_in_a_batch_names_the_batch(rows):
    model = Chain(HalfUsed(nnx.Rngs(0)))
    recipe = lb.Recipe(lb.Rule(".*/unused", None), lb.Rule(".*", "w4a16"))
    with pytest.raises(ValueError, match="batch 1: what enters layers/0 holds NaN"):
        ptq.run(model, recipe, [rows, rows.at[0, 3, 1].set(jnp.nan)], [ptq.GPTQ()])


def test_a_damaged_weight_names_its_block_and_the_blocks_before_are_kept(
    decoder, batches, tmp_path
):
    damaged = nnx.clone(decoder)
    kernel = damaged.layers[1].mlp.up.kernel
    kernel[...] = kernel[...].at[2, 3].set(jnp.nan)
    with pytest.raises(FloatingPointError, match="layers/1: its output holds NaN"):
        ptq.run(damaged, "w4a16", batches, [ptq.RoundToNearest()], workdir=tmp_path)
    kept = [int(p.name) for p in (tmp_path / "blocks").iterdir() if p.name.isdigit()]
    assert kept == [0]


@pytest.mark.parametrize(
    "stages",
    [
        pytest.param([ptq.GPTQ(order="activation", range="mse")], id="GPTQ"),
        pytest.param([ptq.AWQScale(), ptq.AWQClip()], id="AWQ", marks=pytest.mark.slow),
        pytest.param([ptq.BRECQ(steps=4, batch=2)], id="BRECQ", marks=pytest.mark.slow),
    ],
)
def test_constant_activations_give_second_moments_of_rank_one_and_a_finite_model(decoder, stages):
    constant = [jnp.full((4, 16), 7, jnp.int32)] * 2  # one token: every row of an input is equal
    quantized, report = ptq.run(decoder, "w4a8", constant, stages)
    logits = np.asarray(quantized(jax.random.randint(jax.random.key(1), (2, 16), 0, 32)))
    assert np.isfinite(logits).all()
    assert all(np.isfinite(row["output_error"]) for row in report.blocks)
