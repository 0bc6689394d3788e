"""The table of named schemes: `presets["w4a16_g128"]`.

| name | weights | activations |
|---|---|---|
| w{2,3,4,8}a16, _g32 _g64 _g128, _asym | absmax integers, per channel or group | float |
| w8a8, w4a8, w4a4 | absmax integers per channel | narrow integers per token |
| w8a8_narrow | narrow int8 per channel (SmoothQuant, LLM.int8()) | narrow int8 per token |
| w8a8_fp8, w4a8_fp8 | fp8 e4m3, absmax integers, per channel | fp8 e4m3 per token |
| w{4,8}a8_kv{4,8} | the same, for key and value projections | also their outputs (LLM-QAT) |
| w4a4_clip | absmax integers per channel | the same, clipped to 0.9 of the largest (QuaRot) |
| w4a4_asym | integers with zero points per channel | the same per token (OmniQuant) |
| w4a16_lsq, w3a16_lsq, w2a16_lsq, _g32 .. | learned scales (LSQ) per channel or group | float |
| w1_58a16, w1_58a8, _pc | ternary, absmean per tensor or channel (BitNet) | float, int8 per token |
| w1a16, w1a8, _pc | sign times mean magnitude per tensor, or channel | float, int8 per token |
| ..a8_int8, w4a4_int8 | as without `_int8`, multiplied as int8 in the forward pass | the same |
| w1a16_bc | sign (BinaryConnect), per tensor | float |
| w1a1_bnn | signs (BNN), per tensor | signs |
| w1a1_xnor, w1a1_bireal, w1a1_reactnet | sign times mean magnitude per channel | signs |
| w1a1_xnor_scaled | sign times mean magnitude per channel | the same per token |
| w1a{16,8}_bitnet | sign of w less its mean (BitNet), per tensor | float, int8 per token |
| w1a16_onebit | sign times a learned value per channel (OneBit) | float |
| w1a16_elastic, w{1_58,2}a16_stretched | ParetoQ's learned ranges per channel | float |
| w1_58a16_twn | ternary with a threshold (TWN) per tensor | float |
| w1_58a16_ttq | ternary with two learned magnitudes (TTQ) per tensor | float |
| w{2,3,4}a16_lq | sums of a learned basis (LQ-Nets) per channel | float |
| w{2,3,4,8}a16_dorefa | DoReFa-Net's, per tensor | float |
| w2a2_pact, w3a3_pact, w4a4_pact | DoReFa-Net's, per tensor | clipped at a learned value (PACT) |
| w{2,3,4}a16_n2uq, w2a2_n2uq .. w4a4_n2uq | evenly used levels (N2UQ) | learned thresholds |
| w3a3_lsqplus, w4a4_lsqplus | learned scales (LSQ) per channel | learned scale and offset (LSQ+) |
| w4a16_inq, w5a16_apot_learned | largest power of two (INQ), learned clipping (APoT) | float |
| w4a16_pow2, w5a16_apot | powers of two, sums of two of them, per channel | float |
| nvfp4a16, nvfp4 | e2m1, e4m3 scale per 16, float32 factor per tensor | float, calibrated |
| mxfp4a16, mxfp4 | e2m1, e8m0 scale per 32 | float, the same |
| mxfp4_quest | e2m1, rotated, clipped for least error (QuEST) | the same |
| mxfp4_quartet | the same; FP4 backward products (Quartet) | the same |
| mxfp6_e2m3, mxfp6_e3m2, mxfp8_e4m3, mxfp8_e5m2, each with a16 | e8m0 scale per 32 | the same |
| nf4_g64, nf4_g32 | NormalFloat4, absmax per 64 or 32 | float |
| nf4_g64_dq | the same, scales in 8 bits about their mean (QLoRA) | float |
| w{2,3,4}a16_g16_spqr | asymmetric per 16, 3-bit scales in blocks of 16 (SpQR) | float |
| w4a8_g128_qserve | asymmetric per 128, integer scales (QServe) | narrow int8 per token |
"""

import dataclasses
import difflib
from collections.abc import Iterator, Mapping
from typing import Any, Final, override

from lowbit_jax import formats
from lowbit_jax.formats import Format
from lowbit_jax.quantizers import (
    INQ,
    LSQ,
    N2UQ,
    PACT,
    TTQ,
    TWN,
    XNOR,
    Absmax,
    AbsMean,
    APoT,
    CentredSign,
    DoReFa,
    ElasticBinary,
    EntropyPreserving,
    LQNets,
    LSQPlus,
    MinMax,
    OneBit,
    Progressive,
    Quantizer,
    QuEST,
    RSign,
    Sign,
    StaticAbsmax,
    StretchedElastic,
)
from lowbit_jax.scale_formats import E4M3, E8M0
from lowbit_jax.scheme import LayerScheme
from lowbit_jax.spec import (
    Block,
    Granularity,
    PerChannel,
    PerGroup,
    PerTensor,
    PerToken,
    QuantSpec,
    SecondLevel,
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
_A8_FP8: Final = Absmax(QuantSpec(format=formats.FP8_E4M3, granularity=PerToken()))
_A8: Final = Absmax(QuantSpec(format=formats.INT8_NARROW, granularity=PerToken()))
_A4: Final = Absmax(QuantSpec(format=formats.INT4_NARROW, granularity=PerToken()))
_A4_CLIPPED: Final = dataclasses.replace(_A4, share=0.9)
_ZERO_POINTS: Final = QuantSpec(format=formats.get("uint4"), symmetric=False)
_A4_ASYMMETRIC: Final = MinMax(dataclasses.replace(_ZERO_POINTS, granularity=PerToken()))


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
        # A channel's largest weight is a level, where 2 absmax / 255 clips a positive one.
        ("w8a8_narrow", formats.INT8_NARROW, _A8),
        ("w4a8", formats.INT4, _A8),
        ("w4a4", formats.INT4, _A4),
        ("w4a4_clip", formats.INT4, _A4_CLIPPED),
    ):
        scheme = LayerScheme(weight=Absmax(QuantSpec(format=fmt)), input=activations)
        yield from _with_int8(name, scheme)
        if name in ("w8a8", "w4a8"):
            # LLM-QAT's: for the key and value projections, whose outputs a cache keeps.
            for bits, cached in ((8, _A8), (4, _A4)):
                yield f"{name}_kv{bits}", dataclasses.replace(scheme, output=cached)
    yield "w4a4_asym", LayerScheme(weight=MinMax(_ZERO_POINTS), input=_A4_ASYMMETRIC)


def _with_activations(name: str, weight: Quantizer) -> Iterator[tuple[str, LayerScheme]]:
    yield name.format("a16"), LayerScheme(weight=weight)
    yield name.format("a8"), LayerScheme(weight=weight, input=_A8)


def _papers() -> Iterator[tuple[str, LayerScheme]]:
    for bits, fmt in (("1_58", formats.TERNARY), ("1", formats.BINARY)):
        for suffix, granularity in (("", PerTensor()), ("_pc", PerChannel())):
            weight = AbsMean(QuantSpec(format=fmt, granularity=granularity))
            yield f"w{bits}a16{suffix}", LayerScheme(weight=weight)
            yield from _with_int8(f"w{bits}a8{suffix}", LayerScheme(weight=weight, input=_A8))


def _binary() -> Iterator[tuple[str, LayerScheme]]:
    whole = QuantSpec(format=formats.BINARY, granularity=PerTensor())
    channels = QuantSpec(format=formats.BINARY)
    yield "w1a16_bc", LayerScheme(weight=Sign(whole, gradient="identity"))
    yield "w1a1_bnn", LayerScheme(weight=Sign(whole), input=Sign(whole))
    # XNOR-Net's scales of activations are left out, as its successors do.
    yield "w1a1_xnor", LayerScheme(weight=XNOR(channels), input=Sign(whole))
    polynomial = Sign(whole, gradient="polynomial")
    yield "w1a1_bireal", LayerScheme(weight=XNOR(channels), input=polynomial)
    yield "w1a1_reactnet", LayerScheme(weight=XNOR(channels), input=RSign(whole))
    # A scale for every token, too: the mean magnitude of the inputs that a product sums over.
    rows = QuantSpec(format=formats.BINARY, granularity=PerToken())
    yield "w1a1_xnor_scaled", LayerScheme(weight=XNOR(channels), input=XNOR(rows))
    yield from _with_activations("w1{}_bitnet", CentredSign(whole))
    yield "w1a16_onebit", LayerScheme(weight=OneBit(channels))
    yield "w1a16_elastic", LayerScheme(weight=ElasticBinary(channels))


def _few_bits() -> Iterator[tuple[str, LayerScheme]]:
    for name, fmt in (("w1_58", formats.TERNARY), ("w2", formats.INT2_HALF)):
        stretched = StretchedElastic(QuantSpec(format=fmt))
        yield f"{name}a16_stretched", LayerScheme(weight=stretched)
    ternary = QuantSpec(format=formats.TERNARY, granularity=PerTensor())
    yield "w1_58a16_twn", LayerScheme(weight=TWN(ternary))
    learned = QuantSpec(format=formats.TERNARY_LEARNED, granularity=PerTensor())
    yield "w1_58a16_ttq", LayerScheme(weight=TTQ(learned))
    for bits, basis in ((2, formats.BASIS2), (3, formats.BASIS3), (4, formats.BASIS4)):
        # The scale is 1, and e8m0 keeps it in one byte.
        sums = QuantSpec(format=basis, scale_format=E8M0)
        yield f"w{bits}a16_lq", LayerScheme(weight=LQNets(sums))
    for bits in (2, 3, 4, 8):
        half = formats.get(f"int{bits}_half")
        weight = DoReFa(QuantSpec(format=half, granularity=PerTensor()))
        yield f"w{bits}a16_dorefa", LayerScheme(weight=weight)
        if bits < 8:
            unsigned = QuantSpec(
                format=formats.get(f"uint{bits}"), granularity=PerTensor(), symmetric=False
            )
            yield f"w{bits}a{bits}_pact", LayerScheme(weight=weight, input=PACT(unsigned))
        if bits < 8:
            even = EntropyPreserving(QuantSpec(format=half))
            yield f"w{bits}a16_n2uq", LayerScheme(weight=even)
            yield f"w{bits}a{bits}_n2uq", LayerScheme(weight=even, input=N2UQ(unsigned))
        if bits in (3, 4):
            learned_scale = LSQ(QuantSpec(format=_SYMMETRIC[bits]))
            offset = LSQPlus(unsigned)
            yield f"w{bits}a{bits}_lsqplus", LayerScheme(weight=learned_scale, input=offset)
    for name, book in (("w4a16_pow2", formats.POW2_4), ("w5a16_apot", formats.APOT5)):
        yield name, LayerScheme(weight=Absmax(QuantSpec(format=book)))
    yield "w5a16_apot_learned", LayerScheme(weight=APoT(QuantSpec(format=formats.APOT5)))
    powers = QuantSpec(format=formats.POW2_4, scale_format=E8M0)
    yield "w4a16_inq", LayerScheme(weight=INQ(powers))


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
    for name, fmt in (
        ("mxfp4", e2m1),
        ("mxfp6_e2m3", formats.FP6_E2M3),
        ("mxfp6_e3m2", formats.FP6_E3M2),
        ("mxfp8_e4m3", formats.FP8_E4M3),
        ("mxfp8_e5m2", formats.FP8_E5M2),
    ):
        weight = Absmax(QuantSpec(format=fmt, granularity=PerGroup(32), scale_format=E8M0))
        activations = Absmax(QuantSpec(format=fmt, granularity=PerToken(32), scale_format=E8M0))
        yield f"{name}a16", LayerScheme(weight=weight)
        yield name, LayerScheme(weight=weight, input=activations)
    for name, wide in (
        ("w8a8_fp8", QuantSpec(format=formats.FP8_E4M3)),
        ("w4a8_fp8", QuantSpec(format=formats.INT4)),
    ):
        yield name, LayerScheme(weight=Absmax(wide), input=_A8_FP8)
    mx = QuantSpec(format=e2m1, granularity=PerGroup(32), scale_format=E8M0)
    rows = dataclasses.replace(mx, granularity=PerToken(32))
    quest = LayerScheme(weight=QuEST(mx), input=QuEST(rows), hadamard=32)
    yield "mxfp4_quest", quest
    yield "mxfp4_quartet", dataclasses.replace(quest, backward="mxfp4")
    nf4 = QuantSpec(format=formats.NF4, granularity=PerGroup(64))
    yield "nf4_g64", LayerScheme(weight=Absmax(nf4))
    yield "nf4_g32", LayerScheme(weight=Absmax(dataclasses.replace(nf4, granularity=PerGroup(32))))
    # QLoRA's 8 bits about the mean; the outputs of a group share a factor, there 256 in a row do.
    level = SecondLevel(spec=QuantSpec(format=formats.DYNAMIC8), offset="mean")
    yield "nf4_g64_dq", LayerScheme(weight=Absmax(dataclasses.replace(nf4, second=level)))


def _second_levels() -> Iterator[tuple[str, LayerScheme]]:
    """Groups whose scales are quantized in their turn."""
    spqr = SecondLevel(
        spec=QuantSpec(format=formats.INT3_HALF, granularity=PerGroup(16)), offset="middle"
    )
    for bits in (2, 3, 4):
        small = QuantSpec(
            format=formats.get(f"uint{bits}"),
            granularity=PerGroup(16),
            symmetric=False,
            second=spqr,
        )
        yield f"w{bits}a16_g16_spqr", LayerScheme(weight=MinMax(small))
    rows = Block(1, None)  # of the transposed scales: all groups of one output
    integers = SecondLevel(spec=QuantSpec(format=formats.INT8, granularity=rows))
    progressive = QuantSpec(
        format=formats.UINT4, granularity=PerGroup(128), symmetric=False, second=integers
    )
    yield "w4a8_g128_qserve", LayerScheme(weight=Progressive(progressive), input=_A8)


class Presets(Mapping[str, LayerScheme]):
    """The table; an unknown name is a ValueError that lists the nearest."""

    def __init__(self) -> None:
        parts = (_integers(), _papers(), _binary(), _few_bits(), _floats(), _second_levels())
        self._table = {name: scheme for part in parts for name, scheme in part}

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
