"""Which backend multiplies what: the README's table, made from what the backends say themselves."""

from typing import Final

import jax.numpy as jnp

from lowbit_jax import formats
from lowbit_jax.ops import backends
from lowbit_jax.ops.backends.mosaic import Mosaic
from lowbit_jax.ops.prepared import Meta
from lowbit_jax.scale_formats import E4M3, E8M0
from lowbit_jax.spec import PerGroup, QuantSpec

KINDS: Final[dict[str, QuantSpec]] = {
    "binary": QuantSpec(format=formats.BINARY),
    "ternary": QuantSpec(format=formats.TERNARY),
    "int2 (half-shifted)": QuantSpec(format=formats.INT2_HALF),
    "int3": QuantSpec(format=formats.INT3),
    "int4": QuantSpec(format=formats.INT4),
    "int4, groups of 32": QuantSpec(format=formats.INT4, granularity=PerGroup(32)),
    "uint4 with zero points, groups of 128": QuantSpec(
        format=formats.UINT4, granularity=PerGroup(128), symmetric=False
    ),
    "int5, int6, int7": QuantSpec(format=formats.INT6),
    "int8": QuantSpec(format=formats.INT8),
    "uint8 with zero points": QuantSpec(format=formats.UINT8, symmetric=False),
    "NF4, groups of 64": QuantSpec(format=formats.NF4, granularity=PerGroup(64)),
    "NVFP4": QuantSpec(format=formats.FP4_E2M1, granularity=PerGroup(16), scale_format=E4M3),
    "MXFP4": QuantSpec(format=formats.FP4_E2M1, granularity=PerGroup(32), scale_format=E8M0),
    "fp8 e4m3": QuantSpec(format=formats.FP8_E4M3),
}
ACTS: Final = (None, "int8", "fp8")
BACKENDS: Final = {
    "CPU": backends.get("cpu"),
    "TPU": Mosaic("mosaic_tpu", interpret=True),
    "Hopper": Mosaic("mosaic_gpu", interpret=True),
}
K: Final = 256


def meta(spec: QuantSpec) -> Meta:
    """A matrix of 256 x 128 quantized so."""
    return Meta(spec, K, 128, jnp.dtype(jnp.float32), "xla")


def support_table() -> str:
    """Markdown: for every kind of matrix and backend, the activations that its kernels take."""
    lines = [
        "| | " + " | ".join(BACKENDS) + " |",
        "|---|" + "---|" * len(BACKENDS),
    ]
    for name, spec in KINDS.items():
        cells = []
        for backend in BACKENDS.values():
            acts = [act or "float" for act in ACTS if backend.why_not(meta(spec), act) is None]
            cells.append(", ".join(acts) or "no")
        lines.append(f"| {name} | " + " | ".join(cells) + " |")
    return "\n".join(lines)
