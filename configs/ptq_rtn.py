"""Round to nearest in min-max ranges: the data-free baseline of every table.

    uv run python -m experiments.quantize --config ptq_rtn.py

The model of `experiments.train --config float.py`, or --config.model.path=PATH. By a field:
--config.rtn.range=mse searches ranges for least error; --config.pipeline=hqq is HQQ, which needs
no data either (half-quadratic quantization, Badri and Shaji 2023).

Measured (stories260K of karpathy/tinyllamas, calibrated on 128 sequences of 256 tokens of
TinyStories, 76,183 tokens of other stories evaluated, seed 0, two cores shared with other work):
loss over float +0.1081 nats per token (KL 0.1278) with w4a16_asym, 31 s. `:smoke` proves the
machinery.
"""

from lowbit_jax.ptq.job.config import QuantizeConfig


def get_config(variant: str = "") -> QuantizeConfig:
    """The card; `variant` is "" or "smoke"."""
    config = QuantizeConfig(name="ptq_rtn", pipeline="rtn", scheme="w4a16_asym")
    return config.variant(variant)
