"""4-bit weights, 8-bit activations, 4-bit keys and values, after LLM-QAT (arXiv:2305.17888).

    uv run python -m experiments.train --config qat_llmqat.py

Symmetric min-max ranges: weights per output, activations per token, and the outputs of the key and
value projections per token as well, so that what a 4-bit cache will keep is what training saw. Keys
are rounded before their rotary positions (a cache keeps them behind). The paper distills the float
model on text that it wrote itself: `experiments.self_generate` makes such text, and
--config.distill.teacher=runs/float --config.distill.weight=1.0 distills.

`:smoke` proves the machinery, `:study` is the size of experiments.study, `:pod` the 124 M model
(which is stacked: every layer has the same rules, so it may be).
"""

from lowbit_jax.training.config import OptimConfig, TrainConfig

RECIPE = r"layers/.*/(key|value)=w4a8_kv4;layers/.*=w4a8"


def get_config(variant: str = "") -> TrainConfig:
    """The card; `variant` is "", "smoke", "study" or "pod"."""
    config = TrainConfig(name="qat_llmqat", recipe=RECIPE, optim=OptimConfig(lr=4e-3))
    return config.variant(variant)
