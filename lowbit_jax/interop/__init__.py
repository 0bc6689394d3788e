"""Other programs' files: GGUF and Hugging Face folders into our models."""

from lowbit_jax.interop.front import Imported, load_model

__all__ = ["Imported", "load_model"]
