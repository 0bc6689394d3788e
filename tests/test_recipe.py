import json
import re

import pytest

import lowbit_jax as lb


@pytest.mark.parametrize("name", lb.presets)
def test_a_recipe_survives_json(name):
    recipe = lb.Recipe(lb.Rule(r"layers/\d+/.*", name), lb.Rule("head", None))
    text = recipe.to_json()
    assert lb.Recipe.from_json(text) == recipe
    assert set(json.loads(text)) == {"schema", "rules"}


def test_the_json_is_the_one_that_is_documented():
    text = lb.Recipe(lb.Rule("a", "w1_58a16")).to_json()
    assert json.loads(text) == {
        "schema": 1,
        "rules": [
            {
                "path": "a",
                "scheme": {
                    "weight": {
                        "type": "AbsMean",
                        "eps": 1e-5,
                        "spec": {
                            "format": "ternary",
                            "granularity": {"type": "Block", "k": None, "n": None},
                            "symmetric": True,
                            "scale_format": "float32",
                        },
                    }
                },
            }
        ],
    }


def changed(**parts):
    return json.loads(lb.Recipe(lb.Rule("a", "w4a16")).to_json()) | parts


def with_scheme(path, value):
    data = changed()
    node = data["rules"][0]["scheme"]
    for key in path[:-1]:
        node = node[key]
    node[path[-1]] = value
    return data


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (changed(schema=2), "schema 2 is not 1, the one this version reads"),
        ([1], "schema 'list' is not 1"),
        (changed(name="x"), r"keys \['name', 'rules', 'schema'\]"),
        (changed(rules=[3]), "a rule has keys 3"),
        (changed(rules=["ab"]), "a rule has keys ab"),
        (changed(rules=[{"path": "a"}]), r"a rule has keys \['path'\]"),
        (changed(rules=[]), "at least one rule"),
        (changed(rules=[{"path": "a", "scheme": ["w4a16"]}]), "neither a LayerScheme"),
        (changed(rules=[{"path": "a", "scheme": "w4a17"}]), r"no preset is named 'w4a17'"),
        (changed(rules=[{"path": "(", "scheme": None}]), r"'\(' is no regular expression"),
        (with_scheme(["zero"], 1), r"keys \['weight', 'zero'\]"),
        (with_scheme(["weight", "bits"], 4), r"Absmax: keys \['bits',.* not of \['share', 'spec"),
        (with_scheme(["weight", "spec", "axis"], 1), "QuantSpec: keys"),
        (with_scheme(["weight", "spec", "format"], "int44"), "no format is named 'int44'. Nearest"),
        (with_scheme(["weight", "spec", "scale_format"], "fp8"), "scale format 'fp8' is not of"),
        (with_scheme(["weight", "spec", "granularity"], {"type": "Rows"}), "granularity 'Rows'"),
    ],
)
def test_what_this_version_does_not_know_is_refused_by_name(data, message):
    with pytest.raises(ValueError, match=message):
        lb.Recipe.from_json(json.dumps(data))


def test_a_command_line_gives_a_recipe():
    assert lb.Recipe.from_string("") is None
    assert lb.Recipe.from_string(" w4a16_g128 ") == "w4a16_g128"
    recipe = lb.Recipe.from_string(r"layers/0/.*=none; layers/\d+/mlp/(?=u).*=w4a16 ;")
    assert recipe == lb.Recipe(
        lb.Rule("layers/0/.*", None), lb.Rule(r"layers/\d+/mlp/(?=u).*", "w4a16")
    )
    assert lb.Recipe.from_string(recipe.to_json()) == recipe


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("w4a61", "no preset is named 'w4a61'. Nearest"),
        ("a=w4a61", "no preset is named 'w4a61'. Nearest"),
        ("a=w4a16;b", "'b' is not of the form pattern=preset"),
        ("=w4a16", "'=w4a16' is not of the form pattern=preset"),
        ("{", "Expecting property name"),
        ("*=w4a16", r"'\*' is no regular expression"),
    ],
)
def test_a_wrong_command_line_says_what_is_wrong(text, message):
    with pytest.raises(ValueError, match=message):
        lb.Recipe.from_string(text)


def test_the_first_rule_that_matches_a_whole_path_decides():
    recipe = lb.Recipe(lb.Rule("a/b", None), lb.Rule("a/.*", "w4a16"))
    assert recipe.find("a/b").scheme is None
    assert recipe.find("a/bc").scheme == lb.presets["w4a16"]
    assert recipe.find("x/a/b") is None
    assert re.fullmatch(recipe.rules[1].path, "a/") is not None
