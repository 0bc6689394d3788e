"""AWQ: scales from activations, searched, then searched clipping (arXiv:2306.00978).

    uv run python -m experiments.quantize --config ptq_awq.py

Scales are folded into the norm or linear layer in front, so that inference pays nothing. In front
of another solver: --config.pipeline=awq_scale,gptq.

Measured (stories260K of karpathy/tinyllamas, calibrated on 128 sequences of 256 tokens of
TinyStories, 76,183 tokens of other stories evaluated, seed 0, two cores shared with other work):
loss over float +0.0800 nats per token (KL 0.0922) with w4a16_asym, 245 s; +0.0744 nats per token
(KL 0.0806) with w4a16_g32_asym with down per channel, 329 s. `:smoke` proves the machinery.
"""

from lowbit_jax.ptq.job.config import QuantizeConfig


def get_config(variant: str = "") -> QuantizeConfig:
    """The card; `variant` is "" or "smoke"."""
    config = QuantizeConfig(name="ptq_awq", pipeline="awq_scale,awq_clip", scheme="w4a16_asym")
    return config.variant(variant)
