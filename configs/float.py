"""The float twin: the same 3 M byte model unquantized, what every low-bit card is measured against.

    uv run python -m experiments.train --config float.py

Model: decoder, 4 layers, width 256, SwiGLU 640, bytes as tokens; text: the standard library's own
source; AdamW, cosine.

Measured: 2.41 bits/byte (seed 0) after 600 steps, 3.5 minutes of training on two
AVX2 cores. `:smoke` proves the machinery, `:study` is the size of experiments.study, `:pod` the
124 M model.
"""

from lowbit_jax.training.config import OptimConfig, TrainConfig


def get_config(variant: str = "") -> TrainConfig:
    """The card; `variant` is "", "smoke", "study" or "pod"."""
    config = TrainConfig(name="float", recipe="", optim=OptimConfig(lr=4e-3))
    return config.variant(variant)
