import pytest

from lowbit_jax.training.config import TrainConfig
from lowbit_jax.training.validation import validate


@pytest.mark.parametrize("variant", ["", "smoke", "study", "pod"])
def test_every_variant_is_valid(variant):
    validate(TrainConfig().variant(variant))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"steps": 0}, "steps=0: must be > 0"),
        ({"batch": -1}, "batch=-1"),
        ({"dtype": "half"}, "compute dtype 'half' is not known"),
        (
            {"optim.schedule": "linear"},
            "optim.schedule='linear': one of cosine, two_stage, constant",
        ),
        ({"optim.warmup": 1500}, r"optim.warmup=1500: must be in \[0, steps\)"),
        ({"length": 1024}, "length=1024: longer than the model's context"),
        ({"accumulate": 3}, "batch=8: does not split into accumulate=3 parts"),
        ({"model.dim": 250}, "dim=250 does not split into heads=4"),
        ({"distill.weight": 1.5}, r"distill.weight=1.5: must be in \[0, 1\]"),
        ({"data.valid_fraction": 1.0}, "valid_fraction=1.0"),
    ],
)
def test_wrong_values_are_named(change, message):
    with pytest.raises(ValueError, match=message):
        validate(TrainConfig().replace(change))


def test_all_wrong_values_come_at_once():
    with pytest.raises(ValueError, match=r"(?s)steps=0.*batch=0"):
        validate(TrainConfig(steps=0, batch=0))
