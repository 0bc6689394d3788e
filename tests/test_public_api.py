"""The names that the design promises exist, and say what they are."""

import doctest
import importlib
import inspect
import pkgutil
import re
from pathlib import Path

import pytest

import lowbit_jax as lb

CONTRACT = [
    "Format",
    "IntGrid",
    "Codebook",
    "Minifloat",
    "QuantSpec",
    "Block",
    "PerToken",
    "PerTensor",
    "PerChannel",
    "PerGroup",
    "QTensor",
    "Quantizer",
    "Absmax",
    "AbsMean",
    "MinMax",
    "LSQ",
    "StaticAbsmax",
    "LayerScheme",
    "Rule",
    "Recipe",
    "presets",
    "quantize",
    "quantize_model",
    "dequantize_model",
    "pack_model",
    "summary",
    "matmul",
    "calibrate_model",
    "quantized_layers",
    "QuantStat",
    "Packed",
    "Summary",
    "lsq",
    "ste",
    "recipe_of",
    "checkpoint",
    "checkpoint.save",
    "checkpoint.load",
    "checkpoint.read_manifest",
    "formats",
    "packing",
    "estimators",
    "calibrate",
    "calibrate.absmax",
    "calibrate.minmax",
    "calibrate.absmean",
    "calibrate.mse",
    "quantizers",
    "quantizers.ALL",
    "ops",
    "ops.lookup",
    "ops.matmul",
    "prepare",
    "prepare_model",
    "Prepared",
    "checkpoint.digest",
    "FP6_E2M3",
    "FP6_E3M2",
    "E8M0_CEIL",
    "E8M0_EVEN",
    "DYADIC16",
    "codebook",
    "quantized_gradient",
    "DoReFa",
    "ElasticBinary",
    "LSQPlus",
    "PACT",
    "RSign",
    "Sign",
    "StretchedElastic",
    "TWN",
    "XNOR",
    "interop.load_model",
    "interop.export_model",
    "interop.to_qarray",
    "interop.from_qarray",
    "checkpoint.save_async",
    "nn",
    "models",
    "nn.QLinear",
    "nn.QLinearGeneral",
    "nn.QEinsum",
    "nn.QConv",
    "nn.QEmbed",
    "nn.PackedLinear",
    "nn.PackedLinearGeneral",
    "nn.PackedEinsum",
    "nn.PackedConv",
    "nn.PackedEmbed",
    "INT2",
    "INT3",
    "INT4",
    "INT5",
    "INT6",
    "INT7",
    "INT8",
    "UINT2",
    "UINT3",
    "UINT4",
    "UINT5",
    "UINT6",
    "UINT7",
    "UINT8",
    "TERNARY",
    "BINARY",
    "FP4_E2M1",
    "NF4",
    "FLOAT32",
    "BFLOAT16",
    "FLOAT16",
    "E8M0",
    "E4M3",
]
MODULES = sorted(module.name for module in pkgutil.walk_packages(lb.__path__, prefix="lowbit_jax."))


def find(name):
    value = lb
    for part in name.split("."):
        value = getattr(value, part)
    return value


@pytest.mark.parametrize("name", CONTRACT)
def test_the_contract_is_there_and_documented(name):
    value = find(name)
    documented = inspect.ismodule(value) or inspect.isclass(value) or callable(value)
    if documented:
        assert (value.__doc__ or "").strip()
        assert not (value.__doc__ or "").startswith(f"{value.__name__}("), "a dataclass's own text"


def test_all_lists_what_there_is_without_private_names():
    assert len(set(lb.__all__)) == len(lb.__all__)
    assert {name.split(".")[0] for name in CONTRACT} - {"interop"} <= set(lb.__all__)
    for name in lb.__all__:
        assert hasattr(lb, name)
        assert not name.startswith("_") or name == "__version__"


def test_every_public_name_of_every_module_is_documented():
    missing = []
    for name in ("lowbit_jax", *MODULES):
        module = importlib.import_module(name)
        if not (module.__doc__ or "").strip():
            missing.append(name)
        for key, value in vars(module).items():
            own = getattr(value, "__module__", None) == name and not key.startswith("_")
            own = own and (inspect.isclass(value) or inspect.isfunction(value))
            if own and not (value.__doc__ or "").strip():
                missing.append(f"{name}.{key}")
    assert not missing


def test_the_version_is_the_projects():
    text = (Path(__file__).parents[1] / "pyproject.toml").read_text()
    assert lb.__version__ == re.search(r'^version = "(.*)"', text, re.M).group(1)


WITH_EXAMPLES = [
    name for name in MODULES if ">>> " in inspect.getsource(importlib.import_module(name))
]


@pytest.mark.parametrize("name", WITH_EXAMPLES)
def test_the_examples_in_docstrings_hold(name):
    results = doctest.testmod(importlib.import_module(name))
    assert results.attempted
    assert results.failed == 0
