"""Operations on quantized arrays."""

from lowbit_jax.ops.attention import attend
from lowbit_jax.ops.lookup import lookup
from lowbit_jax.ops.matmul import matmul
from lowbit_jax.ops.prepared import Prepared, Target, prepare

__all__ = ["Prepared", "Target", "attend", "lookup", "matmul", "prepare"]
