import dataclasses

import pytest
from flax import nnx

import lowbit_jax as lb

INT8 = lb.QuantSpec(format=lb.INT8)
TOKENS = lb.QuantSpec(format=lb.INT8_NARROW, granularity=lb.PerToken())
WHOLE = lb.QuantSpec(format=lb.INT8_NARROW, granularity=lb.PerTensor())


@pytest.mark.parametrize("name", lb.presets)
def test_a_scheme_survives_its_dict(name):
    scheme = lb.presets[name]
    assert lb.LayerScheme.from_dict(scheme.to_dict()) == scheme
    integer = dataclasses.replace(scheme, product="int8")
    assert lb.LayerScheme.from_dict(integer.to_dict()) == integer
    assert (hash(integer) == hash(scheme)) == (integer == scheme)


def test_a_scheme_says_in_words_what_it_does():
    scheme = lb.LayerScheme(lb.Absmax(INT8), lb.Absmax(TOKENS), product="int8")
    assert scheme.describe() == (
        "Absmax int8 per channel, input Absmax int8_narrow per token, int8 product"
    )
    assert lb.LayerScheme(output=lb.StaticAbsmax(WHOLE)).describe() == (
        "output StaticAbsmax int8_narrow per tensor"
    )


def test_unknown_keys_types_and_products_are_refused_by_name():
    data = lb.presets["w4a16"].to_dict()
    with pytest.raises(ValueError, match=r"keys \['bias', 'weight'\] are not of"):
        lb.LayerScheme.from_dict(data | {"bias": None})
    with pytest.raises(ValueError, match=r"no quantizer is named 'AbsMax'. Nearest: \['Absmax'"):
        lb.LayerScheme.from_dict({"weight": data["weight"] | {"type": "AbsMax"}})
    with pytest.raises(ValueError, match=r"product='int4' is not of"):
        lb.LayerScheme(lb.Absmax(INT8), product="int4")
    with pytest.raises(ValueError, match="nothing to quantize"):
        lb.LayerScheme()


@pytest.mark.parametrize(
    ("error", "parts", "message"),
    [
        (ValueError, {"weight": lb.StaticAbsmax(WHOLE)}, "no kernel is ever calibrated"),
        (ValueError, {"weight": lb.Absmax(TOKENS)}, "cannot have scales per token"),
        (ValueError, {"input": lb.Absmax(INT8)}, "input per channel: .* would run over the tokens"),
        (
            ValueError,
            {"output": lb.Absmax(lb.QuantSpec(format=lb.INT8, granularity=lb.PerGroup(32)))},
            "output in groups of 32",
        ),
        (NotImplementedError, {"input": lb.LSQ(WHOLE)}, "no data to start from"),
    ],
)
def test_quantizers_in_the_wrong_place_are_refused_with_the_right_one(error, parts, message):
    with pytest.raises(error, match=message):
        lb.LayerScheme(**parts)


@pytest.mark.parametrize("cls", [lb.PACT, lb.LSQPlus])
def test_learned_ranges_of_activations_are_no_kernels(cls):
    learned = lb.presets["w4a4_pact"].input
    quantizer = learned if cls is lb.PACT else cls(learned.spec)
    with pytest.raises(ValueError, match=f"weight={cls.__name__} learns a range of activations"):
        lb.LayerScheme(weight=quantizer)


def test_what_rounds_a_function_of_the_array_has_no_int8_product():
    twn = lb.presets["w1_58a16_twn"].weight
    scheme = lb.LayerScheme(weight=twn, input=lb.presets["w4a8"].input, product="int8")
    layer = nnx.Linear(32, 8, rngs=nnx.Rngs(0))
    with pytest.raises(NotImplementedError, match="kernels of TWN round a function of the array"):
        lb.quantize_model(layer, lb.Recipe(lb.Rule(".*", scheme)))
