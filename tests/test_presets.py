"""The table of named schemes, as design.md lists them."""

import dataclasses

import pytest

import lowbit_jax as lb

LISTED = {
    *(
        f"w{bits}a16{group}{zero}"
        for bits in (2, 3, 4, 8)
        for group in ("", "_g32", "_g64", "_g128")
        for zero in ("", "_asym", "_lsq")
    ),
    *("w8a8", "w8a8_narrow", "w4a8", "w4a4", "w4a4_clip", "w4a4_asym", "w8a8_fp8", "w4a8_fp8"),
    *(f"w{bits}a{a}{pc}" for bits in ("1", "1_58") for a in (8, 16) for pc in ("", "_pc")),
    *("nvfp4a16", "nvfp4", "nf4_g64", "nf4_g32", "nf4_g64_dq", "w1a16_onebit"),
    *(
        f"mx{fmt}{a}"
        for fmt in ("fp4", "fp6_e2m3", "fp6_e3m2", "fp8_e4m3", "fp8_e5m2")
        for a in ("", "a16")
    ),
    *("w1a16_bc", "w1a1_bnn", "w1a1_xnor", "w1a1_bireal", "w1a1_reactnet", "w1a16_elastic"),
    *("w1_58a16_twn", "w1_58a16_stretched", "w2a16_stretched", "w4a16_pow2", "w5a16_apot"),
    *(f"w{bits}a16_dorefa" for bits in (2, 3, 4, 8)),
    *(f"w{bits}a{bits}_pact" for bits in (2, 3, 4)),
    *(f"w{bits}a8_kv{kept}" for bits in (4, 8) for kept in (4, 8)),
    *(f"w{bits}a{a}_n2uq" for bits in (2, 3, 4) for a in (bits, 16)),
    *(f"w{bits}a16_lq" for bits in (2, 3, 4)),
    *("w1_58a16_ttq", "w1a16_bitnet", "w1a8_bitnet", "w1a1_xnor_scaled", "w4a16_inq"),
    *("w5a16_apot_learned", "w3a3_lsqplus", "w4a4_lsqplus", "mxfp4_quest", "mxfp4_quartet"),
    *("w2a16_g16_spqr", "w3a16_g16_spqr", "w4a16_g16_spqr", "w4a8_g128_qserve"),
}
INTEGER = {
    "w8a8",
    "w8a8_narrow",
    "w4a8",
    "w4a4",
    "w4a4_clip",
    *(f"w{bits}a8{pc}" for bits in ("1", "1_58") for pc in ("", "_pc")),
}


def test_the_table_is_complete_and_holds_nothing_unlisted():
    listed = LISTED | {f"{name}_int8" for name in INTEGER}
    assert set(lb.presets) == listed
    assert len(lb.presets) == len(listed)
    for name in INTEGER:  # both sides are integers, so that there is an integer product
        scheme = lb.presets[name]
        assert lb.presets[f"{name}_int8"] == dataclasses.replace(scheme, product="int8")


def facts(name):
    weight, inputs = lb.presets[name].weight, lb.presets[name].input
    return (
        type(weight).__name__,
        weight.spec.describe(),
        inputs and f"{type(inputs).__name__} {inputs.spec.describe()}",
    )


INT8_TOKENS = "Absmax int8_narrow per token"


@pytest.mark.parametrize(
    ("name", "expected"),
    {
        "w4a16": ("Absmax", "int4 per channel", None),
        "w2a16": ("Absmax", "int2_half per channel", None),
        "w3a16_g64": ("Absmax", "int3 in groups of 64", None),
        "w8a16_g128_asym": ("MinMax", "uint8 in groups of 128", None),
        "w2a16_g32_lsq": ("LSQ", "int2_half in groups of 32", None),
        "w8a8": ("Absmax", "int8 per channel", INT8_TOKENS),
        "w8a8_narrow": ("Absmax", "int8_narrow per channel", INT8_TOKENS),
        "w4a8": ("Absmax", "int4 per channel", INT8_TOKENS),
        "w4a4": ("Absmax", "int4 per channel", "Absmax int4_narrow per token"),
        "w4a4_asym": ("MinMax", "uint4 per channel", "MinMax uint4 per token"),
        "w8a8_fp8": ("Absmax", "fp8_e4m3 per channel", "Absmax fp8_e4m3 per token"),
        "w4a8_fp8": ("Absmax", "int4 per channel", "Absmax fp8_e4m3 per token"),
        "w1_58a8": ("AbsMean", "ternary per tensor", INT8_TOKENS),
        "w1_58a16_pc": ("AbsMean", "ternary per channel", None),
        "w1a16": ("AbsMean", "binary per tensor", None),
        "w1a8_pc": ("AbsMean", "binary per channel", INT8_TOKENS),
        "nvfp4a16": ("Absmax", "fp4_e2m1 in groups of 16 with e4m3 scales", None),
        "nvfp4": (
            "Absmax",
            "fp4_e2m1 in groups of 16 with e4m3 scales",
            "StaticAbsmax fp4_e2m1 per token in groups of 16 with e4m3 scales",
        ),
        "mxfp4": (
            "Absmax",
            "fp4_e2m1 in groups of 32 with e8m0 scales",
            "Absmax fp4_e2m1 per token in groups of 32 with e8m0 scales",
        ),
        "w1a1_bnn": ("Sign", "binary per tensor", "Sign binary per tensor"),
        "w1a1_reactnet": ("XNOR", "binary per channel", "RSign binary per tensor"),
        "w2a16_stretched": ("StretchedElastic", "int2_half per channel", None),
        "w3a3_pact": ("DoReFa", "int3_half per tensor", "PACT uint3 per tensor"),
        "w5a16_apot": ("Absmax", "apot5 per channel", None),
        "mxfp6_e3m2": (
            "Absmax",
            "fp6_e3m2 in groups of 32 with e8m0 scales",
            "Absmax fp6_e3m2 per token in groups of 32 with e8m0 scales",
        ),
        "nf4_g64": ("Absmax", "nf4 in groups of 64", None),
    }.items(),
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_a_name_means_what_its_paper_or_format_says(name, expected):
    assert facts(name) == expected


def test_an_unknown_name_lists_the_nearest():
    with pytest.raises(ValueError, match=r"no preset is named 'w4a16_g129'. Nearest: .*'w4a16_g12"):
        lb.presets["w4a16_g129"]
    assert "w4a16_g129" not in lb.presets
