"""GPTQ with act-order and clipped ranges (arXiv:2210.17323).

    uv run python -m experiments.quantize --config ptq_gptq.py

Rows by falling second moment of their inputs, ranges searched for least error as by the authors'
option `mse`; the paper's own settings are --config.gptq.order=none --config.gptq.range=minmax.
Errors of the layers before are made good by --config.gptq.propagation=1 (GPTAQ, arXiv:2504.02692).

Measured (stories260K of karpathy/tinyllamas, calibrated on 128 sequences of 256 tokens of
TinyStories, 76,183 tokens of other stories evaluated, seed 0, two cores shared with other work):
loss over float +0.0630 nats per token (KL 0.0750) with w4a16_asym, 100 s; +0.3179 nats per token
(KL 0.3401) with w3a16_g32_asym with down per channel, 111 s. `:smoke` proves the machinery.
"""

from lowbit_jax.ptq.job.config import QuantizeConfig
from lowbit_jax.ptq.job.options import GPTQConfig


def get_config(variant: str = "") -> QuantizeConfig:
    """The card; `variant` is "" or "smoke"."""
    config = QuantizeConfig(
        name="ptq_gptq",
        pipeline="gptq",
        scheme="w4a16_asym",
        gptq=GPTQConfig(order="activation", range="mse"),
    )
    return config.variant(variant)
