import dataclasses

import pytest

from lowbit_jax.training import config as configs
from lowbit_jax.training import fields
from lowbit_jax.training.config import ModelConfig, OptimConfig, TrainConfig


def test_dict_round_trip_and_differences_name_every_changed_field():
    config = TrainConfig(name="x", steps=7, optim=OptimConfig(lr=0.5))
    again = fields.from_dict(fields.to_dict(config), TrainConfig)
    assert again == config
    again.optim.lr, again.model.tied = 0.25, True
    assert fields.differences(config, again) == [
        "model.tied: False -> True",
        "optim.lr: 0.5 -> 0.25",
    ]


def test_an_unknown_field_lists_the_nearest_first():
    with pytest.raises(
        ValueError, match=r"optim\.warmpu: OptimConfig has no field 'warmpu'; it has: warmup,"
    ):
        fields.from_dict({"optim": {"warmpu": 3}}, TrainConfig)
    with pytest.raises(ValueError, match="a float has no field"):
        TrainConfig().replace({"optim.lr.x": 1})


def test_variants_change_the_size_and_the_name_and_leave_the_card_alone():
    card = TrainConfig(name="card", recipe="w1_58a8", optim=OptimConfig(lr=0.125))
    smoke = card.variant("smoke", smoke={"optim.lr": 0.5})
    assert (smoke.name, smoke.recipe, smoke.steps, smoke.optim.lr) == (
        "card_smoke",
        "w1_58a8",
        60,
        0.5,
    )
    assert (card.name, card.steps, card.optim.lr) == ("card", TrainConfig().steps, 0.125)
    assert card.variant("") is card
    assert card.variant("big", big={"model.dim": 512}).model.dim == 512
    with pytest.raises(ValueError, match="card has no variant 'smok'; it has: smoke, pod"):
        card.variant("smok")


def test_fields_are_plain_types_that_flags_can_set():
    # config_flags picks a parser by the annotation; a union or a string annotation has none.
    for cls in (TrainConfig, ModelConfig, OptimConfig, configs.DataConfig, configs.DistillConfig):
        for field in dataclasses.fields(cls):
            assert field.type in (int, float, str, bool) or dataclasses.is_dataclass(field.type)
