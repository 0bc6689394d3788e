"""Operations on quantized arrays."""

from lowbit_jax.ops.lookup import lookup
from lowbit_jax.ops.matmul import matmul

__all__ = ["lookup", "matmul"]
