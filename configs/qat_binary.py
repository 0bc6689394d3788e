"""Binary weights with a scale per matrix, after XNOR-Net (arXiv:1603.05279).

    uv run python -m experiments.train --config qat_binary.py

Weights: {-1, 1} times mean |w|; activations stay float (--config.recipe=w1a8: int8 per token;
w1a16_pc: a scale per output). Embedding and head stay float.

Measured: 2.69 bits/byte (seed 0) after 600 steps, 3.0 minutes of training on two
AVX2 cores. `:smoke` proves the machinery, `:study` is the size of experiments.study, `:pod` the
124 M model.
"""

from lowbit_jax.training.config import OptimConfig, TrainConfig


def get_config(variant: str = "") -> TrainConfig:
    """The card; `variant` is "", "smoke", "study" or "pod"."""
    config = TrainConfig(name="qat_binary", recipe="w1a16", optim=OptimConfig(lr=8e-3))
    return config.variant(variant)
