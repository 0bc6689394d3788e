"""Packed low-bit matrix products as Pallas kernels: arrays in, arrays out."""

from kernels_pallas.api import matmul, prepare, restore, supported
from kernels_pallas.config import GpuConfig, TpuConfig
from kernels_pallas.problem import Affine, Problem, Table

__all__ = [
    "Affine", "GpuConfig", "Problem", "Table", "TpuConfig", "matmul", "prepare", "restore",
    "supported",
]  # fmt: skip
