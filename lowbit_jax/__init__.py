"""lowbit_jax: low-bit models in JAX: trained, calibrated, packed, stored and multiplied by the same
few values.

import lowbit_jax as lb

model = lb.quantize_model(model, "w1_58a8")   # trains on its grid
...                                           # an ordinary optax loop
model = lb.pack_model(model)                  # 2 bits a weight
lb.checkpoint.save("packed", model)
"""

import importlib as _importlib
from typing import Any as _Any

from lowbit_jax import (
    calibrate,
    checkpoint,
    estimators,
    formats,
    lora,
    models,
    nn,
    onebit,
    ops,
    optimizers,
    packing,
    ptq,
    quantizers,
)
from lowbit_jax.estimators import lsq, quantized_gradient, ste
from lowbit_jax.formats import (
    BINARY,
    FP4_E2M1,
    FP6_E2M3,
    FP6_E3M2,
    FP8_E4M3,
    FP8_E5M2,
    INT2,
    INT2_HALF,
    INT3,
    INT4,
    INT4_NARROW,
    INT5,
    INT6,
    INT7,
    INT8,
    INT8_NARROW,
    NF4,
    TERNARY,
    UINT2,
    UINT3,
    UINT4,
    UINT5,
    UINT6,
    UINT7,
    UINT8,
    Codebook,
    Format,
    IntGrid,
    Minifloat,
    codebook,
)
from lowbit_jax.nn import Packed, QuantStat
from lowbit_jax.ops import Prepared, matmul, prepare
from lowbit_jax.presets import presets
from lowbit_jax.ptq import sensitivity
from lowbit_jax.qtensor import QTensor, quantize
from lowbit_jax.quantizers import (
    LSQ,
    PACT,
    TWN,
    XNOR,
    Absmax,
    AbsMean,
    DoReFa,
    ElasticBinary,
    FixedRange,
    LSQPlus,
    MinMax,
    OneBit,
    Quantizer,
    RSign,
    Sign,
    StaticAbsmax,
    StretchedElastic,
)
from lowbit_jax.recipe import Recipe, Rule
from lowbit_jax.scale_formats import (
    BFLOAT16,
    DYADIC16,
    E4M3,
    E8M0,
    E8M0_CEIL,
    E8M0_EVEN,
    FLOAT16,
    FLOAT32,
    ScaleFormat,
)
from lowbit_jax.scheme import LayerScheme
from lowbit_jax.spec import Block, PerChannel, PerGroup, PerTensor, PerToken, QuantSpec, SecondLevel
from lowbit_jax.summary import Summary, summary
from lowbit_jax.surgery import (
    calibrate_model,
    dequantize_model,
    observe_kernels,
    pack_model,
    prepare_model,
    quantize_model,
    quantized_layers,
    recipe_of,
)
from lowbit_jax.version import __version__

__all__ = [
    "BFLOAT16",
    "BINARY",
    "DYADIC16",
    "E4M3",
    "E8M0",
    "E8M0_CEIL",
    "E8M0_EVEN",
    "FLOAT16",
    "FLOAT32",
    "FP4_E2M1",
    "FP6_E2M3",
    "FP6_E3M2",
    "FP8_E4M3",
    "FP8_E5M2",
    "INT2",
    "INT2_HALF",
    "INT3",
    "INT4",
    "INT4_NARROW",
    "INT5",
    "INT6",
    "INT7",
    "INT8",
    "INT8_NARROW",
    "LSQ",
    "NF4",
    "PACT",
    "TERNARY",
    "TWN",
    "UINT2",
    "UINT3",
    "UINT4",
    "UINT5",
    "UINT6",
    "UINT7",
    "UINT8",
    "XNOR",
    "AbsMean",
    "Absmax",
    "Block",
    "Codebook",
    "DoReFa",
    "ElasticBinary",
    "FixedRange",
    "Format",
    "IntGrid",
    "LSQPlus",
    "LayerScheme",
    "MinMax",
    "Minifloat",
    "OneBit",
    "Packed",
    "PerChannel",
    "PerGroup",
    "PerTensor",
    "PerToken",
    "Prepared",
    "QTensor",
    "QuantSpec",
    "QuantStat",
    "Quantizer",
    "RSign",
    "Recipe",
    "Rule",
    "ScaleFormat",
    "SecondLevel",
    "Sign",
    "StaticAbsmax",
    "StretchedElastic",
    "Summary",
    "__version__",
    "calibrate",
    "calibrate_model",
    "checkpoint",
    "codebook",
    "dequantize_model",
    "estimators",
    "formats",
    "lora",
    "lsq",
    "matmul",
    "models",
    "nn",
    "observe_kernels",
    "onebit",
    "ops",
    "optimizers",
    "pack_model",
    "packing",
    "prepare",
    "prepare_model",
    "presets",
    "ptq",
    "quantize",
    "quantize_model",
    "quantized_gradient",
    "quantized_layers",
    "quantizers",
    "recipe_of",
    "sensitivity",
    "ste",
    "summary",
]


def __getattr__(name: str) -> _Any:
    # Readers of files bring tokenizers and safetensors with them: when they are first asked for.
    if name == "interop":
        return _importlib.import_module("lowbit_jax.interop")
    raise AttributeError(f"module 'lowbit_jax' has no attribute {name!r}")
