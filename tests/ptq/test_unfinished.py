"""A run that is asked to stop in the middle of a fit, and goes on there."""

import itertools

import jax.numpy as jnp
import pytest
from flax import nnx

from lowbit_jax import ptq
from lowbit_jax.ptq.reconstruction import engine
from lowbit_jax.ptq.unfinished import Unfinished
from lowbit_jax.testing import assert_same_bits

RECIPE = "w3a16_asym"
STEPS = 60


def pipeline():
    rounding = ptq.Reconstruction((ptq.SoftRounding(1e-2),), steps=STEPS, batch=2)
    return [rounding, ptq.EndToEnd(steps=STEPS, batch=2)]


@pytest.fixture(scope="module")
def whole(decoder, batches):
    model, report = ptq.run(decoder, RECIPE, batches, pipeline())
    return dict(nnx.to_flat_state(nnx.state(model))), report


@pytest.fixture
def spans(monkeypatch):
    """The stretches of steps that were run."""
    seen = []
    inner = engine._run

    def run(*args):
        seen.append(tuple(int(x) for x in args[3]))
        return inner(*args)

    monkeypatch.setattr(engine, "_run", run)
    return seen


def stopping_at(count):
    calls = itertools.count(1)
    return lambda: next(calls) >= count


# A fit of 60 steps asks every 6 steps, and each stage before it begins. Of the questions, 1 and 2
# come before the blocks; 3 to 13 in the first block (4 to 12 in its fit), 14 to 24 in the second,
# 25 and 26 before the stages behind the blocks, 27 to 35 in the end-to-end fit.
@pytest.mark.parametrize(
    ("look", "where", "left"),
    [
        (1, "the whole model before its blocks, stage 0", 3 * STEPS),
        (7, "layers/0, stage 0, behind step 24", 3 * STEPS - 24),
        (13, "layers/0, stage 1", 3 * STEPS),
        (20, "layers/1, stage 0, behind step 36", 2 * STEPS - 36),
        (30, "the whole model behind its blocks, stage 1, behind step 24", STEPS - 24),
    ],
)
def test_a_stopped_run_goes_on_where_it_was_and_ends_with_the_same_bits(
    decoder, batches, whole, spans, tmp_path, look, where, left
):
    with pytest.raises(ptq.Stopped, match=f"^{where}$"):
        ptq.run(decoder, RECIPE, batches, pipeline(), workdir=tmp_path, stop=stopping_at(look))
    spans.clear()
    model, report = ptq.run(decoder, RECIPE, batches, pipeline(), workdir=tmp_path)
    assert sum(end - begin for begin, end in spans) == left
    for path, leaf in nnx.to_flat_state(nnx.state(model)):
        assert_same_bits(leaf[...], whole[0][path][...], "/".join(map(str, path)))
    assert [row["objective_last"] for row in report.layers] == [
        row["objective_last"] for row in whole[1].layers
    ]


def test_a_fit_is_kept_when_a_minute_has_passed_and_not_before(tmp_path):
    def advanced(every):
        fit = Unfinished(tmp_path / str(every), every=every).tagged("a")
        fit.advance(5, [1.5, 2.5], {"x": jnp.float32(3)}, last=False)
        return Unfinished(tmp_path / str(every)).tagged("a").load({"x": jnp.float32(0)})

    assert advanced(60.0) == (0, [], {"x": 0.0})
    assert advanced(0.0) == (5, [1.5, 2.5], {"x": 3.0})
    assert Unfinished(tmp_path / "0.0").tagged("b").load({"x": jnp.float32(0)})[0] == 0
