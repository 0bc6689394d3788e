"""The options of every stage, as fields of a config; defaults are the stages' own.

Mutable twins of the frozen stages: a command line sets their fields one by one, and the stage
checks them when it is made.
"""

import dataclasses


@dataclasses.dataclass(kw_only=True)
class RTNConfig:
    """See `ptq.RoundToNearest`."""

    range: str = "minmax"


@dataclasses.dataclass(kw_only=True)
class GPTQConfig:
    """See `ptq.GPTQ`."""

    range: str = "minmax"
    order: str = "none"
    static_groups: bool = True
    damping: float = 0.01
    propagation: float = 0.0
    block_rows: int = 128


@dataclasses.dataclass(kw_only=True)
class SmoothQuantConfig:
    """See `ptq.transforms.SmoothQuant`."""

    alpha: float = 0.5
    links: str = "norms"


@dataclasses.dataclass(kw_only=True)
class OutlierSuppressionConfig:
    """See `ptq.transforms.OutlierSuppression`."""

    grid: int = 40
    links: str = "all"
    shift: bool = True


@dataclasses.dataclass(kw_only=True)
class AWQScaleConfig:
    """See `ptq.transforms.AWQScale`."""

    grid: int = 20
    links: str = "all"


@dataclasses.dataclass(kw_only=True)
class AWQClipConfig:
    """See `ptq.transforms.AWQClip`."""

    grid: int = 20
    max_shrink: float = 0.5
    skip: str = r"(.*/)?(query|key|q_proj|k_proj)"


@dataclasses.dataclass(kw_only=True)
class RotateConfig:
    """See `ptq.transforms.Rotate`."""

    kind: str = "hadamard"
    seed: int = 0
    residual: bool = True
    values: bool = True
    heads: bool = True
    down: bool = True


@dataclasses.dataclass(kw_only=True)
class EqualizationConfig:
    """See `ptq.transforms.CrossLayerEqualization`."""

    passes: int = 1


@dataclasses.dataclass(kw_only=True)
class HQQConfig:
    """See `ptq.HQQ`."""

    norm: float = 0.7
    beta: float = 10.0
    kappa: float = 1.01
    iterations: int = 20


@dataclasses.dataclass(kw_only=True)
class AdaRoundConfig:
    """See `ptq.AdaRound`."""

    steps: int = 2000
    lr: float = 1e-2
    regularization: float = 0.01


@dataclasses.dataclass(kw_only=True)
class BRECQConfig:
    """See `ptq.BRECQ`.

    objective: "output", or "fisher" for the paper's weights.
    """

    steps: int = 2000
    batch: int = 8
    lr: float = 3e-3
    regularization: float = 0.01
    objective: str = "output"


@dataclasses.dataclass(kw_only=True)
class QDropConfig:
    """See `ptq.QDrop`."""

    steps: int = 2000
    batch: int = 8
    lr: float = 3e-3
    regularization: float = 0.01
    dropped: float = 0.5


@dataclasses.dataclass(kw_only=True)
class AutoRoundConfig:
    """See `ptq.AutoRound`. bits: 0: the fewest of any layer's weights."""

    steps: int = 200
    batch: int = 8
    bits: int = 0


@dataclasses.dataclass(kw_only=True)
class OmniQuantConfig:
    """See `ptq.OmniQuant`.

    equivalence: Whether equivalence is learned beside clipping, with its own learning rate,
        alpha at the start and links.
    """

    steps: int = 2560
    batch: int = 1
    lr: float = 1e-2
    equivalence: bool = False
    equivalence_lr: float = 5e-3
    equivalence_alpha: float = 0.5
    equivalence_links: str = "norms"


@dataclasses.dataclass(kw_only=True)
class EfficientQATConfig:
    """See `ptq.EfficientQAT`: a stage by block and one end to end."""

    steps: int = 500
    end_to_end_steps: int = 200
    batch: int = 8
    lr: float = 1e-4


@dataclasses.dataclass(kw_only=True)
class EndToEndConfig:
    """See `ptq.EndToEnd`.

    lr: Of the scales.
    norms_lr: Of the norms.
    rounding_lr: Of what decides the rounding (`ptq.RoundingOffset`); 0: no code moves.
    rounding_limit: How far a weight may be moved before it is rounded, in steps of its grid.
    written: Documents that the float model writes to be trained on beside the calibration text
        (`ptq.Written`), of a sequence's length, behind the tokenizer's begin token if it has one.
    """

    steps: int = 200
    batch: int = 8
    lr: float = 1e-3
    norms_lr: float = 1e-4
    rounding_lr: float = 0.0
    rounding_limit: float = 1.0
    written: int = 0
