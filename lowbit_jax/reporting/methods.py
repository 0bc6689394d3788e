"""The table of training-time methods: method -> paper -> preset or object -> status."""

import dataclasses
from collections.abc import Iterable
from typing import Final, Literal

from lowbit_jax.reporting.report import markdown_table

Status = Literal["here", "in part", "not here yet"]


@dataclasses.dataclass(frozen=True)
class Method:
    """One method of the field.

    Attributes:
        name: As its paper calls it.
        paper: arXiv number, or a reference.
        use: A preset, or the dotted name of a module or object below `lowbit_jax`; empty where it
            is not here.
        status: "here": value and gradient are held to the paper's equations by a test; "in part":
            what is missing stands in `note`; "not here yet": the reason stands there.
        note: One clause.
    """

    name: str
    paper: str
    use: tuple[str, ...] = ()
    status: Status = "here"
    note: str = ""


METHODS: Final[tuple[Method, ...]] = (
    Method("BinaryConnect", "1511.00363", ("w1a16_bc", "optimizers.clip_latent")),
    Method("BNN", "1602.02830", ("w1a1_bnn",)),
    Method("XNOR-Net, BWN", "1603.05279", ("quantizers.XNOR", "w1a16_pc")),
    Method(
        "XNOR-Net with binary inputs",
        "1603.05279",
        ("w1a1_xnor_scaled", "w1a1_xnor"),
        "in part",
        "a convolution's inputs have one scale a sample, not one a window",
    ),
    Method("DoReFa-Net", "1606.06160", ("w4a16_dorefa", "estimators.quantized_gradient")),
    Method("TWN", "1605.04711", ("w1_58a16_twn",)),
    Method("TTQ", "1612.01064", ("w1_58a16_ttq",)),
    Method("LQ-Nets", "1807.10029", ("w2a16_lq", "observe_kernels"), "in part", "weights only"),
    Method("Bi-Real Net", "1808.00278", ("w1a1_bireal",)),
    Method("ReActNet", "2003.03488", ("w1a1_reactnet", "nn.RPReLU")),
    Method("PACT", "1805.06085", ("w4a4_pact", "quantizers.PACT")),
    Method("LSQ", "1902.08153", ("w4a16_lsq",)),
    Method(
        "LSQ+",
        "2004.09576",
        ("w4a4_lsqplus",),
        "in part",
        "the offset is used at a multiple of the scale",
    ),
    Method(
        "APoT",
        "1909.13144",
        ("w5a16_apot_learned", "w5a16_apot"),
        "in part",
        "weights are not normalized first",
    ),
    Method(
        "INQ",
        "1702.03044",
        ("w4a16_inq", "optimizers.incremental"),
    ),
    Method(
        "N2UQ",
        "2111.14826",
        ("w2a2_n2uq", "estimators.generalized_ste"),
    ),
    Method("BitNet", "2310.11453", ("w1a8_bitnet",)),
    Method("BitNet b1.58", "2402.17764", ("w1_58a8",)),
    Method(
        "OneBit",
        "2402.11295",
        ("w1a16_onebit", "onebit.one_bit_model"),
        "in part",
        "the LayerNorm behind each layer is left to the model",
    ),
    Method("ParetoQ, 1 bit", "2502.02631", ("w1a16_elastic",)),
    Method("ParetoQ, ternary and 2 bits", "2502.02631", ("w1_58a16_stretched", "w2a16_stretched")),
    Method("ParetoQ, 3 and 4 bits", "2502.02631", ("w3a16_lsq", "w4a16_lsq")),
    Method(
        "PARQ",
        "2503.15748",
        ("optimizers.parq",),
        "in part",
        "levels by a quantizer's range; no least-squares search of them beyond one bit",
    ),
    Method(
        "LLM-QAT",
        "2305.17888",
        ("w4a8_kv4", "generation.self_generated"),
        "in part",
        "keys are rounded before their rotary positions, not behind them",
    ),
    Method(
        "QLoRA",
        "2305.14314",
        ("nf4_g64_dq", "lora.add_lora"),
        "in part",
        "the scales of all outputs share a factor, not 256 in a row",
    ),
    Method(
        "SpQR's bilevel groups",
        "2306.03078",
        ("w3a16_g16_spqr",),
        "in part",
        "integer zero points; outliers are not kept apart",
    ),
    Method(
        "QServe's progressive groups",
        "2405.04532",
        ("w4a8_g128_qserve",),
        "in part",
        "weights are rounded once, not to int8 first; without its rotation and smoothing",
    ),
    Method(
        "EfficientQAT",
        "2407.11062",
        ("ptq.reconstruction",),
        "in part",
        "as post-training reconstruction; see the PTQ table",
    ),
    Method("Quartet, QuEST", "2505.14669", ("mxfp4_quartet", "mxfp4_quest")),
    Method("MXFP4, MXFP6, MXFP8", "OCP MX v1.0", ("mxfp4", "mxfp6_e2m3", "mxfp8_e4m3")),
    Method("NVFP4", "2509.25149", ("nvfp4",)),
)


def methods_table(methods: Iterable[Method] = METHODS) -> str:
    """The methods as Markdown."""
    rows = [
        (
            m.name,
            m.paper,
            ", ".join(f"`{name}`" for name in m.use),
            f"{m.status}: {m.note}" if m.note else m.status,
        )
        for m in methods
    ]
    return "\n".join(markdown_table(("method", "paper", "preset or object", "status"), rows)) + "\n"
