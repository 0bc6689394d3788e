"""The best pipeline found: GPTQ, then rounding, scales and norms trained end to end.

    uv run python -m experiments.quantize --config ptq_best.py --config.scheme=w2a16_asym

GPTQ with act-order and searched ranges gives codes and ranges; then an offset of every weight
before it is rounded (SignRound's variable, arXiv:2309.05516, with Adam), all scales and all norms
learn to reproduce the float model's predictions (KL divergence, as in EfficientQAT's second phase,
arXiv:2407.11062, but with codes that may move), on the calibration text and on 1,024 documents that
the float model writes itself (LLM-QAT's data, arXiv:2305.17888): the calibration text alone is
learned by heart. What did not help is in docs/LOG.md.

With 4-bit activations put a rotation in front: --config.pipeline=rotate,gptq,end_to_end
--config.scheme=w4a4_clip.

Measured (stories260K of karpathy/tinyllamas, calibrated on 128 sequences of 256 tokens of
TinyStories, 76,183 tokens of other stories evaluated, seed 0, some 14 minutes of one core each):
loss over float, nats per token, w4a16_asym +0.031, w3a16_asym +0.120, w2a16_asym +0.419; in groups
of 32 with down per channel w4 +0.028 (three seeds; BRECQ with 5,000 steps of one sequence +0.025,
with a larger divergence from the float model), w3 +0.110, w2 +0.391; w4a4_clip +0.149.
`:smoke` proves the machinery.
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
        end_to_end=EndToEndConfig(
            steps=2000, batch=4, lr=2e-3, norms_lr=1e-3, rounding_lr=1e-2, written=1024
        ),
    )
    return config.variant(variant, smoke={"end_to_end.steps": 10, "end_to_end.written": 8})
