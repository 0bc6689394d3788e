"""Other programs' files: GGUF and Hugging Face folders into our models, and out of them."""

from lowbit_jax.interop.export import FORMATS, export_model
from lowbit_jax.interop.front import Imported, load_model
from lowbit_jax.interop.qarrays import from_qarray, to_qarray
from lowbit_jax.interop.table import Written, table_of

__all__ = [
    "FORMATS",
    "Imported",
    "Written",
    "export_model",
    "from_qarray",
    "load_model",
    "table_of",
    "to_qarray",
]
