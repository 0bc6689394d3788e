"""NVFP4 weights: e2m1 values, an e4m3 scale per 16 inputs and a float32 factor per matrix.

    uv run python -m experiments.train --config qat_fp4.py

By a field: --config.recipe=nvfp4 (activations as well, with a calibrated factor: see
`calibrate_every`), mxfp4a16 (an e8m0 scale per 32; OCP Microscaling v1.0, arXiv:2310.10537), mxfp4
(both).

Measured: 2.45 bits/byte (seed 0) after 600 steps, 3.1 minutes of training on two
AVX2 cores. `:smoke` proves the machinery, `:study` is the size of experiments.study, `:pod` the
124 M model.
"""

from lowbit_jax.training.config import OptimConfig, TrainConfig


def get_config(variant: str = "") -> TrainConfig:
    """The card; `variant` is "", "smoke", "study" or "pod"."""
    config = TrainConfig(name="qat_fp4", recipe="nvfp4a16", optim=OptimConfig(lr=4e-3))
    return config.variant(variant)
