"""Text from a model: KV-cached generation, all at once or token by token."""

from lowbit_jax.generation.generate import LanguageModel, generate, sample, stream_tokens
from lowbit_jax.generation.text import TextCodec, stream_text

__all__ = ["LanguageModel", "TextCodec", "generate", "sample", "stream_text", "stream_tokens"]
