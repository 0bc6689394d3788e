"""AutoRound: rounding and ranges by signed gradient descent, by block (arXiv:2309.05516).

    uv run python -m experiments.quantize --config ptq_autoround.py

200 steps of 8 sequences, learning rate 1 / steps falling to zero, twice that at three bits and
fewer.

Measured (stories260K of karpathy/tinyllamas, calibrated on 128 sequences of 256 tokens of
TinyStories, 76,183 tokens of other stories evaluated, seed 0, two cores shared with other work):
loss over float +0.0434 nats per token (KL 0.0459) with w4a16_asym, 227 s. `:smoke` proves the
machinery.
"""

from lowbit_jax.ptq.job.config import QuantizeConfig


def get_config(variant: str = "") -> QuantizeConfig:
    """The card; `variant` is "" or "smoke"."""
    config = QuantizeConfig(name="ptq_autoround", pipeline="autoround", scheme="w4a16_asym")
    return config.variant(variant, smoke={"autoround.steps": 10})
