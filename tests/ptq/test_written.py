"""Documents of the float model as samples: what they are, who is refused, that they are used."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import lowbit_jax as lb
from lowbit_jax import ptq
from lowbit_jax.ptq.job.config import QuantizeConfig
from lowbit_jax.ptq.job.pipelines import make_pipeline
from lowbit_jax.ptq.stage import ModelWork


def work(model, batches, events=None):
    return ModelWork(
        model=model,
        reference=model,
        schemes={},
        batches=batches,
        forward=lambda m, x: m(x),
        key=jax.random.key(5),
        wiring=None,
        note=lambda *_: None,
        emit=lambda kind, **fields: None if events is None else events.append(fields),
    )


def test_documents_follow_the_batches_and_repeat(decoder, batches):
    events = []
    samples = ptq.Written(10, first=3, batch=4).samples(work(decoder, batches, events))
    again = ptq.Written(10, first=3, batch=4).samples(work(decoder, batches))
    assert [len(part) for part in samples] == [4, 4, 4, 4, 4, 2]
    for ours, given in zip(samples, batches, strict=False):
        assert ours is given
    text = np.concatenate(samples[3:])
    assert text.shape == (10, 16)
    assert text.dtype == batches[0].dtype
    assert (text[:, 0] == 3).all()
    assert len(np.unique(text, axis=0)) == 10
    np.testing.assert_array_equal(text, np.concatenate(again[3:]))
    assert [event["step"] for event in events] == [4, 8, 10]


def test_documents_are_drawn_from_the_models_distribution(decoder, batches):
    """The first drawn token's frequencies, against the probabilities behind the begin token."""
    n = 512
    samples = ptq.Written(n, first=3).samples(work(decoder, [b[:, :4] for b in batches]))
    text = np.concatenate(samples[len(batches) :])
    wanted = np.asarray(jax.nn.softmax(decoder(jnp.full((1, 1), 3))[0, 0]))
    found = np.bincount(text[:, 1], minlength=32) / n
    # Pearson's statistic over n is a sum of 32 squares with mean (1 - p) / n each: 31 / n, and
    # sqrt(2 * 31) / n deviates; five of those.
    assert ((found - wanted) ** 2 / wanted).sum() * n < 31 + 5 * np.sqrt(62)


def test_without_a_begin_token_they_begin_as_in_the_paper(decoder, batches):
    samples = ptq.Written(8, greedy=2).samples(work(decoder, batches))
    text = np.concatenate(samples[3:])
    assert len(set(text[:, 0].tolist())) > 3
    likely = np.asarray(decoder(jnp.asarray(text))).argmax(-1)
    np.testing.assert_array_equal(text[:, 1:3], likely[:, :2])


def test_training_sees_them(decoder, batches):
    def scales(written):
        stage = ptq.EndToEnd(steps=3, batch=4, written=written)
        model, _ = ptq.run(decoder, "w2a16_asym", batches, [ptq.RoundToNearest(), stage])
        return jax.tree.leaves(nnx.state(model))

    with_them, without, again = (scales(ptq.Written(n, first=3)) for n in (8, 0, 8))
    assert any((a != b).any() for a, b in zip(with_them, without, strict=True))
    for a, b in zip(with_them, again, strict=True):
        np.testing.assert_array_equal(a, b)


class NoWriter(nnx.Module):
    def __init__(self, *, rngs):
        self.block = nnx.Sequential(nnx.Linear(8, 8, rngs=rngs))

    def __call__(self, x):
        return self.block(x)


def test_who_writes_nothing_is_refused(decoder, batches):
    model = NoWriter(rngs=nnx.Rngs(0))
    rows = [jnp.ones((4, 8))]
    with pytest.raises(NotImplementedError, match="a NoWriter writes no documents"):
        ptq.Written(4).samples(work(model, rows))
    assert ptq.Written(0).samples(work(model, rows)) == rows
    pairs = [{"tokens": batch} for batch in batches]
    with pytest.raises(NotImplementedError, match="not arrays of tokens"):
        ptq.Written(4).samples(work(decoder, pairs))


@pytest.mark.parametrize("wrong", [{"documents": -1}, {"batch": 0}, {"greedy": -1}])
def test_counts_below_the_least_are_refused(wrong):
    with pytest.raises(ValueError, match=next(iter(wrong))):
        ptq.Written(**wrong)


def test_a_run_begins_them_with_its_tokenizers_begin_token():
    config = QuantizeConfig(pipeline="end_to_end").replace({"end_to_end.written": 7})
    assert make_pipeline(config, 1) == [ptq.EndToEnd(written=ptq.Written(7, first=1))]
    assert make_pipeline(config) == [ptq.EndToEnd(written=ptq.Written(7))]
    assert dataclasses.asdict(make_pipeline(config)[0])["written"]["documents"] == 7
    assert lb.ptq.Written is ptq.Written
