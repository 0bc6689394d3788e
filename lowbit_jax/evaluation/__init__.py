"""Measures of a language model: cross-entropy, perplexity, bits per byte.

evaluate(model, tokens, length=128, batch=8, byte_count=tokenizer.byte_count)
"""

from lowbit_jax.evaluation.evaluate import Evaluation, bits_per_byte, evaluate
from lowbit_jax.evaluation.losses import cross_entropy, token_nll

__all__ = ["Evaluation", "bits_per_byte", "cross_entropy", "evaluate", "token_nll"]
