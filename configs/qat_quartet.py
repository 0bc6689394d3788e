"""FP4 training after Quartet (arXiv:2505.14669): all three products of a linear layer in MXFP4.

    uv run python -m experiments.train --config qat_quartet.py

Forward: inputs and weights behind a Hadamard rotation of 32, clipped where QuEST's error is least,
rounded to the nearest e2m1 value with an e8m0 scale per 32. Backward: both operands of both
products behind a random rotation, rounded stochastically; gradients are unbiased. Embedding and
head stay float. Forward only: --config.recipe=mxfp4_quest.

Computed in float32 numbers on the grid: this trains what such hardware would, and no faster.
`:smoke` proves the machinery, `:study` is the size of experiments.study, `:pod` the 124 M model
(which is stacked: FP4 backward products want --config.model.stacked=False).
"""

from lowbit_jax.training.config import OptimConfig, TrainConfig


def get_config(variant: str = "") -> TrainConfig:
    """The card; `variant` is "", "smoke", "study" or "pod"."""
    config = TrainConfig(name="qat_quartet", recipe="mxfp4_quartet", optim=OptimConfig(lr=4e-3))
    return config.variant(variant, pod={"model.stacked": False})
