"""Round to nearest: the data-free baseline of every table."""

import dataclasses
from typing import ClassVar, override

import jax

from lowbit_jax.ptq.ranges import RangeName, check_range, find_range, snapped
from lowbit_jax.ptq.solver import LayerSolver
from lowbit_jax.ptq.stage import LayerProblem, LayerSolution


@dataclasses.dataclass(frozen=True)
class RoundToNearest(LayerSolver):
    """Every weight to its nearest value of the grid.

    Attributes:
        range: See `ranges.find_range`; "minmax" is the usual baseline, "mse" GPTQ's clipping.
    """

    range: RangeName = "minmax"

    uses_data: ClassVar[bool] = False

    def __post_init__(self):
        check_range("RoundToNearest", self.range)
        if self.range == "hessian":
            raise ValueError("RoundToNearest: range='hessian' needs data. Use 'mse'.")

    @override
    def solve(self, problem: LayerProblem, key: jax.Array) -> LayerSolution:
        range_ = find_range(problem.weight, problem.spec, self.range, quantizer=problem.quantizer)
        return LayerSolution(snapped(problem.weight, problem.spec, range_), range_)
