"""Packed low-bit matrix products as Pallas kernels: arrays in, arrays out."""

from kernels_pallas.api import (
    attend,
    attend_unsupported,
    matmul,
    prepare,
    restore,
    round_rows,
    supported,
)
from kernels_pallas.attention import Attention
from kernels_pallas.config import GpuConfig, TpuConfig
from kernels_pallas.problem import Affine, Problem, Table
from kernels_pallas.rounding import Rounding

__all__ = [
    "Affine", "Attention", "GpuConfig", "Problem", "Rounding", "Table", "TpuConfig", "attend",
    "attend_unsupported", "matmul", "prepare", "restore", "round_rows", "supported",
]  # fmt: skip
