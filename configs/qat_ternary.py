"""Ternary weights and int8 activations, trained from scratch after BitNet b1.58 (arXiv:2402.17764).

    uv run python -m experiments.train --config qat_ternary.py

Weights: {-1, 0, 1} times mean |w| of the matrix; activations: int8 with a scale per token;
embedding and head stay float. The paper's finding is that ternary wants a higher learning rate than
float; its two-stage schedule is --config.optim.schedule=two_stage. Distillation from a float run:
--config.distill.teacher=runs/float.

Measured: 2.65 bits/byte (seed 0) after 600 steps, 3.3 minutes of training on two
AVX2 cores. `:smoke` proves the machinery, `:study` is the size of experiments.study, `:pod` the
124 M model.
"""

from lowbit_jax.training.config import OptimConfig, TrainConfig


def get_config(variant: str = "") -> TrainConfig:
    """The card; `variant` is "", "smoke", "study" or "pod"."""
    config = TrainConfig(name="qat_ternary", recipe="w1_58a8", optim=OptimConfig(lr=8e-3))
    return config.variant(variant)
