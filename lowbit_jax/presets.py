"""The table of named schemes: `presets["w4a16_g128"]`.

| name | weights | activations |
|---|---|---|
| w{2,3,4,8}a16, _g32 _g64 _g128, _asym | absmax integers, per channel or group | float |
| w8a8, w4a8, w4a4 | absmax integers per channel | narrow integers per token |
| w4a4_clip | absmax integers per channel | the same, clipped to 0.9 of the largest (QuaRot) |
| w4a16_lsq, w3a16_lsq, w2a16_lsq, _g32 .. | learned scales (LSQ) per channel or group | float |
| w1_58a16, w1_58a8, _pc | ternary, absmean per tensor or channel (BitNet) | float, int8 per token |
| w1a16, w1a8, _pc | sign times mean magnitude per tensor, or channel | float, int8 per token |
| ..a8_int8, w4a4_int8 | as without `_int8`, multiplied as int8 in the forward pass | the same |
| nvfp4a16, nvfp4 | e2m1, e4m3 scale per 16, float32 factor per tensor | float, calibrated |
| mxfp4a16, mxfp4 | e2m1, e8m0 scale per 32 | float, the same |
| nf4_g64 | NormalFloat4, absmax per 64 | float |
"""

import dataclasses
import difflib
from collections.abc import Iterator, Mapping
from typing import Any, Final, override

from lowbit_jax import formats
from lowbit_jax.formats import Format
from lowbit_jax.quantizers import LSQ, Absmax, AbsMean, MinMax, Quantizer, StaticAbsmax
from lowbit_jax.scheme import LayerScheme
from lowbit_jax.spec import (
    E4M3,
    E8M0,
    Granularity,
    PerChannel,
    PerGroup,
    PerTensor,
    PerToken,
    QuantSpec,
)

_SYMMETRIC: Final[dict[int, Format]] = {
    2: formats.INT2_HALF,
    3: formats.INT3,
    4: formats.INT4,
    8: formats.INT8,
}
_GRANULARITIES: Final[dict[str, Granularity]] = {
    "": PerChannel(),
    "_g32": PerGroup(32),
    "_g64": PerGroup(64),
    "_g128": PerGroup(128),
}
_A8: Final = Absmax(QuantSpec(format=formats.INT8_NARROW, granularity=PerToken()))
_A4: Final = Absmax(QuantSpec(format=formats.INT4_NARROW, granularity=PerToken()))
_A4_CLIPPED: Final = dataclasses.replace(_A4, share=0.9)


def _integers() -> Iterator[tuple[str, LayerScheme]]:
    for bits, fmt in _SYMMETRIC.items():
        for suffix, granularity in _GRANULARITIES.items():
            name = f"w{bits}a16{suffix}"
            symmetric = QuantSpec(format=fmt, granularity=granularity)
            unsigned = formats.get(f"uint{bits}")
            asymmetric = QuantSpec(format=unsigned, granularity=granularity, symmetric=False)
            yield name, LayerScheme(weight=Absmax(symmetric))
            yield f"{name}_asym", LayerScheme(weight=MinMax(asymmetric))
            yield f"{name}_lsq", LayerScheme(weight=LSQ(symmetric))
    for name, fmt, activations in (
        ("w8a8", formats.INT8, _A8),
        ("w4a8", formats.INT4, _A8),
        ("w4a4", formats.INT4, _A4),
        ("w4a4_clip", formats.INT4, _A4_CLIPPED),
    ):
        yield from _with_int8(
            name, LayerScheme(weight=Absmax(QuantSpec(format=fmt)), input=activations)
        )


def _papers() -> Iterator[tuple[str, LayerScheme]]:
    for bits, fmt in (("1_58", formats.TERNARY), ("1", formats.BINARY)):
        for suffix, granularity in (("", PerTensor()), ("_pc", PerChannel())):
            weight = AbsMean(QuantSpec(format=fmt, granularity=granularity))
            yield f"w{bits}a16{suffix}", LayerScheme(weight=weight)
            yield from _with_int8(f"w{bits}a8{suffix}", LayerScheme(weight=weight, input=_A8))


def _with_int8(name: str, scheme: LayerScheme) -> Iterator[tuple[str, LayerScheme]]:
    yield name, scheme
    yield f"{name}_int8", dataclasses.replace(scheme, product="int8")


def _floats() -> Iterator[tuple[str, LayerScheme]]:
    e2m1 = formats.FP4_E2M1
    weight: Quantizer = Absmax(QuantSpec(format=e2m1, granularity=PerGroup(16), scale_format=E4M3))
    activations: Quantizer = StaticAbsmax(
        QuantSpec(format=e2m1, granularity=PerToken(16), scale_format=E4M3)
    )
    yield "nvfp4a16", LayerScheme(weight=weight)
    yield "nvfp4", LayerScheme(weight=weight, input=activations)
    weight = Absmax(QuantSpec(format=e2m1, granularity=PerGroup(32), scale_format=E8M0))
    activations = Absmax(QuantSpec(format=e2m1, granularity=PerToken(32), scale_format=E8M0))
    yield "mxfp4a16", LayerScheme(weight=weight)
    yield "mxfp4", LayerScheme(weight=weight, input=activations)
    nf4 = QuantSpec(format=formats.NF4, granularity=PerGroup(64))
    yield "nf4_g64", LayerScheme(weight=Absmax(nf4))


class Presets(Mapping[str, LayerScheme]):
    """The table; an unknown name is a ValueError that lists the nearest."""

    def __init__(self) -> None:
        self._table = dict(_integers()) | dict(_papers()) | dict(_floats())

    def __getitem__(self, name: str) -> LayerScheme:
        if name not in self._table:
            near = difflib.get_close_matches(name, self._table, n=6, cutoff=0.4)
            raise ValueError(
                f"no preset is named {name!r}. Nearest: {near or sorted(self._table)}."
            )
        return self._table[name]

    @override
    def get(self, name: str, default: Any = None) -> Any:
        """The scheme, or `default` where there is none of that name."""
        return self._table.get(name, default)

    def __contains__(self, name: object) -> bool:
        return name in self._table

    def __iter__(self) -> Iterator[str]:
        return iter(self._table)

    def __len__(self) -> int:
        return len(self._table)


presets: Final = Presets()
