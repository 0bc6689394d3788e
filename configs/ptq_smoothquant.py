"""SmoothQuant: outliers of activations moved into the weights (arXiv:2211.10438).

    uv run python -m experiments.quantize --config ptq_smoothquant.py

Int8 weights per channel and activations per token, both in narrow ranges as the authors have them,
rounded to nearest. By a field:
--config.smoothquant.alpha=0.75; --config.pipeline=smoothquant,gptq --config.scheme=w4a8; outlier
suppression instead: --config.pipeline=outlier_suppression,rtn (arXiv:2304.09145).

Measured (stories260K of karpathy/tinyllamas, calibrated on 128 sequences of 256 tokens of
TinyStories, 76,183 tokens of other stories evaluated, seed 0, two cores shared with other work):
loss over float +0.0005 nats per token (standard error 0.0002, KL 0.0012). `:smoke` proves
the machinery.
"""

from lowbit_jax.ptq.job.config import QuantizeConfig


def get_config(variant: str = "") -> QuantizeConfig:
    """The card; `variant` is "" or "smoke"."""
    config = QuantizeConfig(
        name="ptq_smoothquant", pipeline="smoothquant,rtn", scheme="w8a8_narrow"
    )
    return config.variant(variant)
