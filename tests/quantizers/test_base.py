import json

import pytest

from lowbit_jax import formats, quantizers, testing
from lowbit_jax.quantizers import LSQ, Absmax, AbsMean, MinMax, from_dict
from lowbit_jax.spec import QuantSpec

SPEC = QuantSpec(format=formats.INT4)


def test_json_round_trip_of_every_admitted_quantizer():
    for q in testing.admitted():
        assert from_dict(json.loads(json.dumps(q.to_dict()))) == q
    q = AbsMean(SPEC, eps=1e-3)
    assert from_dict(q.to_dict()) == q
    assert q.to_dict()["type"] == "AbsMean"


def test_every_quantizer_admits_something():
    learning = {cls for cls in quantizers.ALL if cls.learns_values}
    # What takes two levels of scales only is in tests/test_second_level.py.
    others = learning | {quantizers.Progressive}
    assert {type(q) for q in testing.admitted()} == set(quantizers.ALL) - others
    # Formats whose values are learned are of no use to the others, and these take nothing else.
    specs = [QuantSpec(format=fmt) for fmt in formats.LEARNED]
    for cls in learning:
        assert any(_admits(cls, spec) for spec in specs), cls


def _admits(cls, spec):
    try:
        cls(spec)
    except (ValueError, NotImplementedError):
        return False
    return True


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"type": "AbsMaen"}, "'AbsMaen'.*AbsMean"),
        ({"type": "_StraightThrough"}, "_StraightThrough.*Nearest"),
        ({"type": None}, "no quantizer"),
        ({"epsilon": 1}, "epsilon"),
        ({"spec": {"format": "int44"}}, "int44"),
    ],
)
def test_unknown_types_and_keys_are_refused(change, message):
    with pytest.raises(ValueError, match=message):
        from_dict(AbsMean(SPEC).to_dict() | change)


def test_the_names_offered_are_those_of_quantizers():
    with pytest.raises(ValueError, match="Nearest") as e:
        from_dict({"type": "zzz", "spec": SPEC.to_dict()})
    assert "_" not in str(e.value).split("Nearest")[1]


@pytest.mark.parametrize(
    "make",
    [
        lambda: MinMax(SPEC),
        lambda: Absmax(QuantSpec(format=formats.UINT4, symmetric=False)),
        lambda: LSQ(QuantSpec(format=formats.UINT4, symmetric=False)),
    ],
)
def test_zero_points_go_to_the_quantizers_that_have_them(make):
    with pytest.raises(ValueError, match="only"):
        make()


def test_quantizers_are_hashable_values():
    assert {AbsMean(SPEC), AbsMean(SPEC), AbsMean(SPEC, eps=1.0)} == {
        AbsMean(SPEC),
        AbsMean(SPEC, eps=1.0),
    }
