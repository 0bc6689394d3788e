import dataclasses
import inspect

import pytest

import lowbit_jax as lb
from lowbit_jax import ptq
from lowbit_jax.ptq.job import QuantizeConfig
from lowbit_jax.ptq.job.pipelines import (
    PLAIN,
    STAGES,
    describe_method,
    describe_scheme,
    make_pipeline,
    make_recipe,
)

# Options whose meaning here is another than in the stage.
OWN = {
    "autoround": {"bits"},
    "omniquant": {"equivalence", "equivalence_lr", "equivalence_alpha", "equivalence_links"},
    "end_to_end": {
        *("lr", "norms_lr", "rounding_lr", "rounding_limit"),
        *("variables", "module_variables", "optimizer", "written"),
    },
}
MAKERS = {
    **PLAIN,
    "autoround": ptq.AutoRound,
    "omniquant": ptq.OmniQuant,
    "end_to_end": ptq.EndToEnd,
}


@pytest.mark.parametrize("name", STAGES)
def test_every_option_of_a_stage_is_a_field_with_the_stages_own_default(name):
    parameters = inspect.signature(MAKERS[name]).parameters.values()
    defaults = {p.name: p.default for p in parameters}
    options = dataclasses.asdict(getattr(QuantizeConfig(), name))
    own = OWN.get(name, set())
    assert {k: v for k, v in options.items() if k not in own} == {
        k: v for k, v in defaults.items() if k not in own
    }


def test_end_to_end_has_the_stages_own_variables():
    assert make_pipeline(QuantizeConfig(pipeline="end_to_end")) == [ptq.EndToEnd()]


def test_omniquant_learns_an_equivalence_if_asked():
    config = QuantizeConfig(pipeline="omniquant")
    assert make_pipeline(config) == [ptq.OmniQuant()]
    config = config.replace({"omniquant.equivalence": True, "omniquant.equivalence_alpha": 0.75})
    assert make_pipeline(config) == [ptq.OmniQuant(equivalence=ptq.Equivalence(alpha=0.75))]


@pytest.mark.parametrize(("scheme", "bits"), [("w4a16", 4), ("w2a16_g32", 2)])
def test_autoround_takes_its_bits_from_the_scheme(scheme, bits):
    config = QuantizeConfig(pipeline="autoround", scheme=scheme)
    assert make_pipeline(config) == [ptq.AutoRound(bits=bits)]


@pytest.mark.parametrize("name", STAGES)
def test_every_stage_can_be_made_from_the_defaults(name):
    assert len(make_pipeline(QuantizeConfig(pipeline=name))) == 1 + (name == "efficientqat")


def test_a_pipeline_has_its_stages_in_order_with_their_options():
    config = QuantizeConfig(pipeline="smoothquant, gptq").replace(
        {"smoothquant.alpha": 0.75, "gptq.order": "group"}
    )
    first, second = make_pipeline(config)
    assert (first.alpha, second.order) == (0.75, "group")
    assert first.transforms
    assert not second.transforms
    assert describe_method(config) == "smoothquant(alpha=0.75) + gptq(order=group)"


@pytest.mark.parametrize(
    ("pipeline", "message"),
    [
        ("gptqq", "there is no stage 'gptqq'. Stages, nearest first: gptq,"),
        ("", "name at least one stage"),
        ("rtn,rtn", "each once"),
    ],
)
def test_wrong_pipelines_list_the_stages(pipeline, message):
    with pytest.raises(ValueError, match=message):
        make_pipeline(QuantizeConfig(pipeline=pipeline))


def test_rules_replace_the_scheme_and_the_first_match_decides():
    config = QuantizeConfig(scheme="w8a16")
    assert make_recipe(config).find("layers/0/mlp/up").resolved == lb.presets["w8a16"]
    config = config.replace({"rules": ".*/down=w4a16_asym; .*/up=none; .*=w4a16_g32_asym"})
    recipe = make_recipe(config)
    assert recipe.find("layers/0/mlp/down").resolved == lb.presets["w4a16_asym"]
    assert recipe.find("layers/0/mlp/up").resolved is None
    assert recipe.find("layers/0/mlp/gate").resolved == lb.presets["w4a16_g32_asym"]
    assert describe_scheme(config).startswith(".*/down=w4a16_asym;")


def test_wrong_schemes_list_the_nearest():
    for changes in ({"scheme": "w4a16_asim"}, {"rules": ".*=w4a16_asim"}):
        with pytest.raises(ValueError, match=r"'w4a16_asim'. Nearest: \['w4a16_asym'"):
            make_recipe(QuantizeConfig().replace(changes))
    with pytest.raises(ValueError, match="nothing says how to quantize"):
        make_recipe(QuantizeConfig(scheme=""))
