"""The best pipeline found: GPTQ, then rounding, scales and norms trained end to end.

    uv run python -m experiments.quantize --config ptq_best.py --config.scheme=w2a16_asym

GPTQ with act-order and searched ranges gives codes and ranges; then an offset of every weight
before it is rounded (SignRound's variable, arXiv:2309.05516, with Adam), all scales and all norms
learn to reproduce the float model's predictions (KL divergence, as in EfficientQAT's second phase,
arXiv:2407.11062, but with codes that may move). What did not help is in docs/LOG.md.

With 4-bit activations put a rotation in front: --config.pipeline=rotate,gptq,end_to_end
--config.scheme=w4a4_clip. `:smoke` proves the machinery.
"""

from lowbit_jax.ptq.job.config import QuantizeConfig
from lowbit_jax.ptq.job.options import EndToEndConfig, GPTQConfig


def get_config(variant: str = "") -> QuantizeConfig:
    """The card; `variant` is "" or "smoke"."""
    config = QuantizeConfig(
        name="ptq_best",
        pipeline="gptq,end_to_end",
        scheme="w4a16_asym",
        gptq=GPTQConfig(order="activation", range="mse"),
        end_to_end=EndToEndConfig(steps=1000, batch=4, lr=2e-3, norms_lr=1e-3, rounding_lr=1e-2),
    )
    return config.variant(variant, smoke={"end_to_end.steps": 10})
