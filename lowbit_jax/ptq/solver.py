"""Solvers that choose the codes of one layer at a time."""

import abc
import dataclasses
import math
from collections.abc import Sequence
from typing import Any, ClassVar, override

import jax
import jax.numpy as jnp

from lowbit_jax.ptq.ranges import find_range, snapped
from lowbit_jax.ptq.stage import BlockWork, LayerProblem, LayerSolution, Stage
from lowbit_jax.ptq.statistics import (
    Moments,
    moments,
    moments_with_drift,
    output_error,
    weight_error,
)


class LayerSolver(Stage, abc.ABC):
    """Solves the layers of a block in the order in which they are called.

    Layers behind others see what the quantized ones before them make ("true sequential"): their
    inputs are collected anew after each group of layers that share an input.
    """

    uses_data: ClassVar[bool] = True
    """Whether the inputs of the layers are collected for it."""
    propagation: float = 0.0
    """Share of the error of all layers before that a layer makes good (`GPTQ.propagation`)."""

    @abc.abstractmethod
    def solve(self, problem: LayerProblem, key: jax.Array) -> LayerSolution:
        """Chooses the codes of one layer.

        Args:
            problem: The layer and the moments of its inputs.
            key: For what is random.
        """

    @override
    def flops(self, shapes: Sequence[tuple[int, ...]], tokens: int, samples: int) -> float:
        if not self.uses_data:
            return 0.0
        passes = 4 if self.propagation else 2
        moments = sum(math.prod(s[:-1]) * s[-2] for s in shapes)
        # A pass of the block for each of its groups, about one for two layers; the moments; two
        # factorizations and the updates of each kernel.
        forward = passes * tokens * sum(map(math.prod, shapes)) * len(shapes) / 2
        return forward + passes * tokens * sum(s[-2] ** 2 for s in shapes) + 4 * moments * 3

    @override
    def block(self, work: BlockWork) -> None:
        keys = iter(jax.random.split(work.key, len(work.weight_paths) + 1))
        for group in work.groups():
            matrices = {path: work.matrix(path).astype(jnp.float32) for path in group}
            found = self._moments(work, matrices) if self.uses_data else {}
            for path, matrix in matrices.items():
                quantizer = work.schemes[path].weight
                assert quantizer is not None
                problem = LayerProblem(path, matrix, quantizer.spec, quantizer)
                if path in found:
                    problem = _with_moments(problem, found[path])
                solution = self.solve(problem, next(keys))
                work.settle(path, solution)
                work.note(path, _figures(problem, solution))

    def _moments(self, work: BlockWork, matrices: dict[str, Any]) -> dict[str, Moments]:
        if self.propagation:
            blocks, chains = (work.original, work.working), (work.chain, work.chain_hat)
            return moments_with_drift(blocks, chains, matrices)
        return moments(work.working, work.chain_hat, matrices)


def _with_moments(problem: LayerProblem, found: Moments) -> LayerProblem:
    tokens = found.tokens
    k = problem.weight.shape[-2]
    if float(tokens.min()) < k:
        where = "" if not tokens.shape else f" (stack entry {int(tokens.argmin())})"
        raise ValueError(
            f"{problem.path}{where}: calibration gave it {int(tokens.min())} tokens, fewer than "
            f"its {k} inputs: their second moments would not have full rank. Calibrate on more "
            "or longer sequences, or quantize it with a data-free solver."
        )
    count = tokens[..., None, None]
    drift = None if found.drift is None else found.drift / count
    return dataclasses.replace(problem, hessian=found.hessian / count, drift=drift, tokens=tokens)


def _figures(problem: LayerProblem, solution: LayerSolution) -> dict[str, Any]:
    """What the report says of a layer: errors of round-to-nearest and of the solution."""
    figures = dict(solution.info)
    weight, spec = problem.weight, problem.spec
    nearest = snapped(weight, spec, find_range(weight, spec, "minmax"))
    for name, chosen in (("before", nearest), ("after", solution.weight)):
        if problem.hessian is not None:
            figures[f"error_{name}"] = float(output_error(weight, chosen, problem.hessian))
        figures[f"weight_error_{name}"] = float(weight_error(weight, chosen))
    return figures
