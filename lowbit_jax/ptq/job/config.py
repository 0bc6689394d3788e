"""What one run of post-training quantization is, as data: `--config.gptq.order=group` sets a field.

Like `training.config`: mutable dataclasses of plain values. Every stage that a pipeline can have
has a field of its name with its options, whether or not the pipeline has it.
"""

import dataclasses
from typing import Any

from lowbit_jax.ptq.job.options import (
    AdaRoundConfig,
    AutoRoundConfig,
    AWQClipConfig,
    AWQScaleConfig,
    BRECQConfig,
    EfficientQATConfig,
    EndToEndConfig,
    EqualizationConfig,
    GPTQConfig,
    HQQConfig,
    OmniQuantConfig,
    OutlierSuppressionConfig,
    QDropConfig,
    RotateConfig,
    RTNConfig,
    SmoothQuantConfig,
)
from lowbit_jax.training.fields import at_variant, replaced


@dataclasses.dataclass(kw_only=True)
class SourceConfig:
    """path: A GGUF file, a Hugging Face folder, a run's folder or another checkpoint of ours."""

    path: str = "runs/float"


@dataclasses.dataclass(kw_only=True)
class CalibrationConfig:
    """What the model sees while it is calibrated.

    source: "text:GLOB", or the training split of "stdlib" or "hf:NAME[:CONFIG]".
    separator: Where the files of "text:GLOB" are cut into documents; "": each is one.
    documents: At most the first so many documents; 0: all.
    sequences: Sequences of the joined documents, from the first on.
    length: Tokens of one sequence; 0: the model's training length, 256 where it is not known.
    batch: Sequences at once.
    """

    source: str = "stdlib"
    separator: str = ""
    documents: int = 0
    sequences: int = 128
    length: int = 0
    batch: int = 8


@dataclasses.dataclass(kw_only=True)
class EvaluationConfig:
    """What the model is evaluated on, at four positions; see `job.text`.

    source: "text:GLOB", or the validation split of "stdlib" or "hf:NAME[:CONFIG]".
    separator: As of the calibration.
    sequences: At most so many windows or documents, evenly over the text; 0: all of "text:GLOB",
        512 of the others.
    length: Context, in tokens; 0: as of the calibration.
    batch: Windows at once; changes speed, not the result.
    """

    source: str = "stdlib"
    separator: str = ""
    sequences: int = 0
    length: int = 0
    batch: int = 16


@dataclasses.dataclass(kw_only=True)
class QuantizeConfig:
    """One run: `quantize(config, source, workdir)` reads nothing else.

    pipeline: Names of stages, in order, such as "smoothquant,gptq": transforms, then a solver.
    scheme: A preset's name, for all linear layers of the blocks.
    rules: "pattern=preset;pattern=preset" or recipe JSON over the linear layers of the blocks, the
        first that matches decides; replaces `scheme` where it is not "".
    include: Layers outside the blocks over which scheme or rules range too: "embed,head".
    blocks: Pattern that matches the whole path of every block.
    seed: Of everything random.
    sensitivity: Whether the harm of every layer on its own is measured first (see
        `ptq.sensitivity`).
    memory_limit_gb: Refuses a run that needs more; 0: than the machine has available.
    """

    name: str = "ptq"
    pipeline: str = "rtn"
    scheme: str = "w4a16_asym"
    rules: str = ""
    include: str = ""
    blocks: str = r"layers/\d+"
    seed: int = 0
    sensitivity: bool = False
    memory_limit_gb: float = 0.0
    model: SourceConfig = dataclasses.field(default_factory=SourceConfig)
    calibration: CalibrationConfig = dataclasses.field(default_factory=CalibrationConfig)
    evaluation: EvaluationConfig = dataclasses.field(default_factory=EvaluationConfig)
    rtn: RTNConfig = dataclasses.field(default_factory=RTNConfig)
    gptq: GPTQConfig = dataclasses.field(default_factory=GPTQConfig)
    smoothquant: SmoothQuantConfig = dataclasses.field(default_factory=SmoothQuantConfig)
    outlier_suppression: OutlierSuppressionConfig = dataclasses.field(
        default_factory=OutlierSuppressionConfig
    )
    awq_scale: AWQScaleConfig = dataclasses.field(default_factory=AWQScaleConfig)
    awq_clip: AWQClipConfig = dataclasses.field(default_factory=AWQClipConfig)
    rotate: RotateConfig = dataclasses.field(default_factory=RotateConfig)
    equalization: EqualizationConfig = dataclasses.field(default_factory=EqualizationConfig)
    hqq: HQQConfig = dataclasses.field(default_factory=HQQConfig)
    adaround: AdaRoundConfig = dataclasses.field(default_factory=AdaRoundConfig)
    brecq: BRECQConfig = dataclasses.field(default_factory=BRECQConfig)
    qdrop: QDropConfig = dataclasses.field(default_factory=QDropConfig)
    autoround: AutoRoundConfig = dataclasses.field(default_factory=AutoRoundConfig)
    omniquant: OmniQuantConfig = dataclasses.field(default_factory=OmniQuantConfig)
    efficientqat: EfficientQATConfig = dataclasses.field(default_factory=EfficientQATConfig)
    end_to_end: EndToEndConfig = dataclasses.field(default_factory=EndToEndConfig)

    def variant(self, name: str, **variants: dict[str, Any]) -> "QuantizeConfig":
        """This config at another size, named `<name>_<variant>`; "" is the config itself.

        Every config has "smoke" (a minute on two cores, on the model of float.py:smoke); keyword
        arguments add to it or to new ones: `variant(name, smoke={"brecq.steps": 10})`.
        """
        return at_variant(self, name, VARIANTS, variants)

    def replace(self, changes: dict[str, Any]) -> "QuantizeConfig":
        """A copy with the fields of dotted path set: `replace({"gptq.damping": 0.1})`."""
        return replaced(self, changes)


# It proves the machinery; its numbers mean nothing.
VARIANTS: dict[str, dict[str, Any]] = {
    "smoke": {
        "model.path": "runs/float_smoke",
        "calibration.sequences": 16,
        "evaluation.sequences": 32,
    },
}
