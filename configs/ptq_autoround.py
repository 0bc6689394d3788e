"""AutoRound: rounding and ranges by signed gradient descent, by block (arXiv:2309.05516).

    uv run python -m experiments.quantize --config ptq_autoround.py

200 steps of 8 sequences, learning rate 1 / steps falling to zero, twice that at three bits and
fewer.

`:smoke` proves the machinery.
"""

from lowbit_jax.ptq.job.config import QuantizeConfig


def get_config(variant: str = "") -> QuantizeConfig:
    """The card; `variant` is "" or "smoke"."""
    config = QuantizeConfig(name="ptq_autoround", pipeline="autoround", scheme="w4a16_asym")
    return config.variant(variant, smoke={"autoround.steps": 10})
