"""BRECQ: rounding learned block by block (arXiv:2102.05426).

    uv run python -m experiments.quantize --config ptq_brecq.py

2,000 steps of 8 sequences a block where the authors take 20,000 of 32 images. Weighted by Fisher
information, as in the paper: --config.brecq.objective=fisher. By the layer:
--config.pipeline=adaround (arXiv:2004.10568); with quantized activations dropped half of the time:
--config.pipeline=qdrop --config.scheme=w4a4 (arXiv:2203.05740).

`:smoke` proves the machinery.
"""

from lowbit_jax.ptq.job.config import QuantizeConfig


def get_config(variant: str = "") -> QuantizeConfig:
    """The card; `variant` is "" or "smoke"."""
    config = QuantizeConfig(name="ptq_brecq", pipeline="brecq", scheme="w4a16_asym")
    return config.variant(variant, smoke={"brecq.steps": 10})
