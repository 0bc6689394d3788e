"""CPU kernels in C++ behind XLA's foreign function interface; arrays in, arrays out."""

from kernels_cpu.api import PANEL, Codes, matmul, panels, unpanels, unsupported
from kernels_cpu.library import instruction_set, missing

__all__ = [
    "PANEL",
    "Codes",
    "instruction_set",
    "matmul",
    "missing",
    "panels",
    "unpanels",
    "unsupported",
]
