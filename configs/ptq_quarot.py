"""QuaRot: Hadamard rotations, then GPTQ, for 4-bit activations (arXiv:2404.00456).

    uv run python -m experiments.quantize --config ptq_quarot.py

Residual stream and values are rotated in the weights; heads in front of the output projection and
the MLP's hidden features by explicit modules. Keys and queries are not rotated: no cache is
quantized. Rounded to nearest instead: --config.pipeline=rotate,rtn.

`:smoke` proves the machinery.
"""

from lowbit_jax.ptq.job.config import QuantizeConfig
from lowbit_jax.ptq.job.options import GPTQConfig


def get_config(variant: str = "") -> QuantizeConfig:
    """The card; `variant` is "" or "smoke"."""
    config = QuantizeConfig(
        name="ptq_quarot", pipeline="rotate,gptq", scheme="w4a4", gptq=GPTQConfig(range="mse")
    )
    return config.variant(variant)
