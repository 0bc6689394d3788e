"""Reconstruction of one layer at a time, from the second moments of its inputs alone."""

import dataclasses
import functools
from typing import Any, override

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array

from lowbit_jax.ptq.ranges import RangeName, check_range, find_range
from lowbit_jax.ptq.reconstruction.optimizer import ADAM, Optimizer
from lowbit_jax.ptq.reconstruction.variables import (
    Start,
    Variable,
    initial,
    learned_kernel,
    settled,
)
from lowbit_jax.ptq.solver import LayerSolver
from lowbit_jax.ptq.stage import LayerProblem, LayerSolution
from lowbit_jax.spec import QuantSpec


@dataclasses.dataclass(frozen=True)
class LayerReconstruction(LayerSolver):
    """Learns variables so that a layer's output is near to the float one, on all data at once.

    The squared error of a linear layer's output is tr((V - W)^T H (V - W)), with H the second
    moments of its inputs in the quantized model: no sample is drawn, and no activation is kept.

    Attributes:
        variables: What is learned of the kernel.
        optimizer: How variables are stepped.
        steps: How many steps.
        range: Where the range starts; see `ranges.find_range`.
    """

    variables: tuple[Variable, ...]
    optimizer: Optimizer = ADAM
    steps: int = 1000
    range: RangeName = "mse"

    def __post_init__(self):
        check_range("LayerReconstruction", self.range)
        if self.steps < 1:
            raise ValueError(f"LayerReconstruction: steps={self.steps} is below 1.")

    @override
    def solve(self, problem: LayerProblem, key: jax.Array) -> LayerSolution:
        assert problem.hessian is not None
        range_ = find_range(
            problem.weight,
            problem.spec,
            self.range,
            quantizer=problem.quantizer,
            importance=jnp.diagonal(problem.hessian, axis1=-2, axis2=-1),
        )
        start = Start(problem.weight, range_)
        parameters = _fit(self, problem.spec, start, problem.hessian)
        weight, found, latent = jax.jit(settled, static_argnums=(0, 3))(
            self.variables, parameters, start, problem.spec
        )
        return LayerSolution(weight, found, latent=latent)


@functools.partial(jax.jit, static_argnums=(0, 1))
def _fit(settings: LayerReconstruction, spec: QuantSpec, start: Start, hessian: Array) -> Any:
    variables = settings.variables
    parameters = initial(variables, start, spec)
    rates = {str(i): variable.lr for i, variable in enumerate(variables)}
    labels = [jax.tree.map(lambda _, i=i: str(i), p) for i, p in enumerate(parameters)]
    transformation = settings.optimizer.build(settings.steps, rates, labels)

    def objective(parameters: Any, step: Array) -> Array:
        difference = learned_kernel(variables, parameters, start, spec) - start.weight
        error = jnp.sum(difference * jnp.matmul(hessian, difference))
        progress = step.astype(jnp.float32) / settings.steps
        pairs = zip(variables, parameters, strict=True)
        return error + sum(variable.penalty(p, progress) for variable, p in pairs)

    def step(i: Array, carry: Any) -> Any:
        parameters, state = carry
        gradient = jax.grad(objective)(parameters, i)
        updates, state = transformation.update(gradient, state, parameters)
        moved = optax.apply_updates(parameters, updates)
        pairs = zip(variables, moved, strict=True)
        return [variable.project(p) for variable, p in pairs], state

    carry = (parameters, transformation.init(parameters))
    return jax.lax.fori_loop(0, settings.steps, step, carry)[0]
