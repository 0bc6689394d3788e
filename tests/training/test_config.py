import dataclasses

import pytest

from lowbit_jax.training import config as configs
from lowbit_jax.training.config import ModelConfig, OptimConfig, TrainConfig


def test_dict_round_trip_and_differences_name_every_changed_field():
    config = TrainConfig(name="x", steps=7, optim=OptimConfig(lr=0.5))
    again = configs.from_dict(configs.to_dict(config))
    assert again == config
    again.optim.lr, again.model.tied = 0.25, True
    assert configs.differences(config, again) == [
        "model.tied: False -> True",
        "optim.lr: 0.5 -> 0.25",
    ]


def test_an_unknown_field_lists_the_nearest_first():
    with pytest.raises(ValueError, match=r"optim\.warmpu: OptimConfig has no field 'warmpu'; it has: warmup,"):
        configs.from_dict({"optim": {"warmpu": 3}})
    with pytest.raises(ValueError, match="a float has no field"):
        TrainConfig().replace({"optim.lr.x": 1})


def test_variants_change_the_size_and_the_name_and_leave_the_card_alone():
    card = TrainConfig(name="card", recipe="w1_58a8", optim=OptimConfig(lr=0.125))
    smoke = card.variant("smoke", smoke={"optim.lr": 0.5})
    assert (smoke.name, smoke.recipe, smoke.steps, smoke.optim.lr) == ("card_smoke", "w1_58a8", 60, 0.5)
    assert (card.name, card.steps, card.optim.lr) == ("card", 1500, 0.125)
    assert card.variant("") is card
    assert card.variant("big", big={"model.dim": 512}).model.dim == 512
    with pytest.raises(ValueError, match="card has no variant 'smok'; it has: smoke, pod"):
        card.variant("smok")


@pytest.mark.parametrize("variant", ["", "smoke", "pod"])
def test_every_variant_is_valid(variant):
    configs.validate(TrainConfig().variant(variant))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"steps": 0}, "steps=0: must be > 0"),
        ({"batch": -1}, "batch=-1"),
        ({"dtype": "half"}, "compute dtype 'half' is not known"),
        ({"optim.schedule": "linear"}, "optim.schedule='linear': one of cosine, two_stage, constant"),
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
        configs.validate(TrainConfig().replace(change))


def test_all_wrong_values_come_at_once():
    with pytest.raises(ValueError, match=r"(?s)steps=0.*batch=0"):
        configs.validate(TrainConfig(steps=0, batch=0))


def test_fields_are_plain_types_that_flags_can_set():
    # config_flags picks a parser by the annotation; a union or a string annotation has none.
    for cls in (TrainConfig, ModelConfig, OptimConfig, configs.DataConfig, configs.DistillConfig):
        for field in dataclasses.fields(cls):
            assert field.type in (int, float, str, bool) or dataclasses.is_dataclass(field.type)
