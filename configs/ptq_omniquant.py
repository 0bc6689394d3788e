"""OmniQuant: learned clipping, by block (arXiv:2308.13137).

    uv run python -m experiments.quantize --config ptq_omniquant.py

2,560 steps of one sequence, the authors' 20 epochs; they take 40 at two bits
(--config.omniquant.steps=5120). Learned equivalence as well: --config.omniquant.equivalence=True;
for W4A4 with --config.omniquant.equivalence_lr=1e-3 --config.omniquant.equivalence_alpha=0.75.

`:smoke` proves the machinery.
"""

from lowbit_jax.ptq.job.config import QuantizeConfig


def get_config(variant: str = "") -> QuantizeConfig:
    """The card; `variant` is "" or "smoke"."""
    config = QuantizeConfig(name="ptq_omniquant", pipeline="omniquant", scheme="w4a16_asym")
    return config.variant(variant, smoke={"omniquant.steps": 10})
