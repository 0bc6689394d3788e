"""Text from a model: KV-cached generation, all at once or token by token."""

from lowbit_jax.generation.generate import LanguageModel, generate, sample, stream_tokens
from lowbit_jax.generation.kivi import KiviCache, KiviSpec
from lowbit_jax.generation.quantized_cache import QuantizedKVCache, quantized_cache
from lowbit_jax.generation.text import TextCodec, stream_text

__all__ = [
    "KiviCache",
    "KiviSpec",
    "LanguageModel",
    "QuantizedKVCache",
    "TextCodec",
    "generate",
    "quantized_cache",
    "sample",
    "stream_text",
    "stream_tokens",
]
