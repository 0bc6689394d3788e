"""INT4 weights in groups of 32 whose scales are learned (LSQ, arXiv:1902.08153).

    uv run python -m experiments.train --config qat_int4.py

Weights: -8 .. 7 times a scale per 32 inputs of an output; the scale is a parameter without weight
decay, which moves with `optim.scale_lr` times the learning rate. Activations stay float. Absmax
instead: --config.recipe=w4a16_g32.

Measured: 2.38 bits/byte (seed 0) after 600 steps, 3.1 minutes of training on two
AVX2 cores. `:smoke` proves the machinery, `:study` is the size of experiments.study, `:pod` the
124 M model.
"""

from lowbit_jax.training.config import OptimConfig, TrainConfig


def get_config(variant: str = "") -> TrainConfig:
    """The card; `variant` is "", "smoke", "study" or "pod"."""
    config = TrainConfig(
        name="qat_int4", recipe="w4a16_g32_lsq", optim=OptimConfig(lr=4e-3, scale_lr=0.1)
    )
    return config.variant(variant)
