"""The loop that all reconstructions share: kernels made of variables, an objective, an optimizer.

The whole of it is one compiled program per structure of module, whatever the number of steps, so
that blocks of equal structure share it.
"""

import dataclasses
import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Final, NamedTuple

import jax
import jax.numpy as jnp
import optax
from flax import nnx
from jaxtyping import Array

from lowbit_jax.ptq.layers import float_class, set_matrix
from lowbit_jax.ptq.reconstruction.modules import ModuleVariable, Work
from lowbit_jax.ptq.reconstruction.optimizer import Optimizer
from lowbit_jax.ptq.reconstruction.variables import (
    Start,
    Variable,
    initial,
    learned_kernel,
    settled,
)
from lowbit_jax.ptq.stage import LayerSolution
from lowbit_jax.spec import QuantSpec
from lowbit_jax.walk import layers

Loss = Callable[[nnx.Module, Any, Any, Array], Array]
"""loss(module, samples, context, key): the objective on some samples; hashable, and equal for equal
objectives."""


@dataclasses.dataclass(frozen=True)
class Fit:
    """What is static in a fit.

    Attributes:
        loss: The objective.
        variables: Of every kernel.
        module_variables: Of the module's other parts.
        optimizer: How they are stepped.
        specs: (path, spec) of every kernel that is made of variables.
        steps: How many steps.
        batch: Samples a step.
    """

    loss: Loss
    variables: tuple[Variable, ...]
    module_variables: tuple[ModuleVariable, ...]
    optimizer: Optimizer
    specs: tuple[tuple[str, QuantSpec], ...]
    steps: int
    batch: int


# Steps between two looks at the request to stop; the same program runs them all.
_STRETCH: Final = 25


class _Carry(NamedTuple):
    parameters: Any
    optimizer: Any
    losses: Array


@dataclasses.dataclass
class Fitted:
    """The result of a fit.

    Attributes:
        solutions: Of every kernel, by path.
        module: The module with what its module variables learned; its kernels are those it had.
        losses: Mean objective of each tenth of the steps.
    """

    solutions: dict[str, LayerSolution]
    module: nnx.Module
    losses: list[float]


def fit(
    settings: Fit,
    module: nnx.Module,
    starts: Mapping[str, Start],
    samples: Any,
    context: Any,
    work: Work,
    on_progress: Callable[[int, float], None] | None = None,
) -> Fitted:
    """Learns the variables.

    Args:
        settings: What to learn, and how.
        module: Whose kernels are replaced by learned ones.
        starts: Where each kernel starts, by path.
        samples: Pytree of arrays with the samples along their first axis.
        context: Passed to the objective as it is.
        work: What the stage works on; its key draws the samples, and what the objective draws.
        on_progress: Called ten times with (steps done, mean objective of the tenth).

    Raises:
        FloatingPointError: The objective became NaN or infinite.
        Stopped: The run was asked to.
    """
    specs = dict(settings.specs)
    parameters = {
        "kernels": {
            path: initial(settings.variables, starts[path], spec) for path, spec in specs.items()
        },
        "module": [variable.init(module, starts, work) for variable in settings.module_variables],
    }
    graphdef, state = nnx.split(module)
    stepwise = _slow_in_loops(module)
    carry = _begin(settings, parameters)
    tenth = max(settings.steps // 10, 1)
    begin, sums, carry = work.unfinished.load(carry)
    while begin < settings.steps:
        part = begin // tenth
        end = min(begin + _STRETCH, (part + 1) * tenth, settings.steps)
        arrays = (state, dict(starts), samples, context, work.key)
        carry = carry._replace(losses=jnp.zeros(()))
        if stepwise:
            for i in range(begin, end):
                carry = _step(settings, graphdef, carry, jnp.int32(i), *arrays)
        else:
            span = (jnp.int32(begin), jnp.int32(end))
            carry = _run(settings, graphdef, carry, span, *arrays)
        if not jnp.isfinite(carry.losses):
            raise FloatingPointError(
                f"the reconstruction's objective became {carry.losses} before step {end}. Lower "
                "the learning rates, or look for NaN in what enters the block."
            )
        sums += [0.0] * (part + 1 - len(sums))
        sums[part] += float(carry.losses)
        work.unfinished.advance(end, sums, carry, last=end == settings.steps)
        if on_progress is not None and (end % tenth == 0 or end == settings.steps):
            on_progress(end, sums[part] / (end - part * tenth))
        begin = end
    sizes = [min(tenth, settings.steps - part * tenth) for part in range(len(sums))]
    losses = [total / size for total, size in zip(sums, sizes, strict=True)]
    info = {"objective_first": losses[0], "objective_last": losses[-1]}
    final = carry.parameters
    for variable, values in zip(settings.module_variables, final["module"], strict=True):
        variable.apply(values, module)
    solutions = {
        path: _settled(
            settings.variables,
            final["kernels"][path],
            _row_scaled(settings, final["module"], path, starts[path], spec),
            spec,
            info,
        )
        for path, spec in specs.items()
    }
    return Fitted(solutions, module, losses)


def _settled(
    variables: Sequence[Variable],
    parameters: Any,
    start: Start,
    spec: QuantSpec,
    info: dict[str, Any],
) -> LayerSolution:
    weight, range_, latent = _compiled_settled(variables, parameters, start, spec)
    return LayerSolution(weight, range_, info, latent)


_compiled_settled = jax.jit(settled, static_argnums=(0, 3))


def _labels(parameters: Any) -> Any:
    """The name of the variable that each parameter belongs to."""
    kernels = {
        path: [jax.tree.map(lambda _, i=i: f"kernel{i}", p) for i, p in enumerate(each)]
        for path, each in parameters["kernels"].items()
    }
    modules = [
        jax.tree.map(lambda _, i=i: f"module{i}", p) for i, p in enumerate(parameters["module"])
    ]
    return {"kernels": kernels, "module": modules}


def _transformation(settings: Fit, parameters: Any) -> Any:
    rates = {f"kernel{i}": v.lr for i, v in enumerate(settings.variables)}
    rates |= {f"module{i}": v.lr for i, v in enumerate(settings.module_variables)}
    return settings.optimizer.build(settings.steps, rates, _labels(parameters))


@functools.partial(jax.jit, static_argnums=0)
def _begin(settings: Fit, parameters: Any) -> _Carry:
    return _Carry(parameters, _transformation(settings, parameters).init(parameters), jnp.zeros(()))


def _slow_in_loops(module: nnx.Module) -> bool:
    """Whether steps are called one by one.

    XLA's CPU backend takes 17 times as long for a step of two convolutions in a compiled loop as
    outside of one (docs/LOG.md).
    """
    convolves = any(float_class(layer) is nnx.Conv for _, layer in layers(module))
    return convolves and jax.default_backend() == "cpu"


@functools.partial(jax.jit, static_argnums=(0, 1), donate_argnums=2)
def _run(
    settings: Fit,
    graphdef: Any,
    carry: _Carry,
    span: tuple[Array, Array],
    *arrays: Any,
) -> _Carry:
    """Steps span[0] .. span[1]; a loop of dynamic length, so that all of them share a program."""
    return jax.lax.fori_loop(
        span[0], span[1], lambda i, carry: _stepped(settings, graphdef, carry, i, *arrays), carry
    )


def _stepped(
    settings: Fit,
    graphdef: Any,
    carry: _Carry,
    i: Array,
    state: Any,
    starts: Any,
    samples: Any,
    context: Any,
    key: Array,
) -> _Carry:
    """One step, whose objective is added to the losses."""
    transformation = _transformation(settings, carry.parameters)
    count = jax.tree.leaves(samples)[0].shape[0]
    draw, loss_key = jax.random.split(jax.random.fold_in(key, i))
    size = min(settings.batch, count)
    rows = jax.random.choice(draw, count, (size,), replace=False)
    chosen = jax.tree.map(lambda x: x[rows], samples)

    def objective(parameters: Any) -> Any:
        module = nnx.merge(graphdef, state, copy=True)
        progress = i.astype(jnp.float32) / settings.steps
        penalty = _place(settings, module, parameters, starts, progress)
        loss = settings.loss(module, chosen, context, loss_key)
        return loss + penalty, loss

    grads, loss = jax.grad(objective, has_aux=True)(carry.parameters)
    updates, optimizer = transformation.update(grads, carry.optimizer, carry.parameters)
    parameters = _projected(settings, optax.apply_updates(carry.parameters, updates))
    return _Carry(parameters, optimizer, carry.losses + loss)


_step = jax.jit(_stepped, static_argnums=(0, 1), donate_argnums=2)


def _place(
    settings: Fit, module: nnx.Module, parameters: Any, starts: Any, progress: Array
) -> Array:
    """Gives the module its learned kernels and parts; returns the sum of all penalties."""
    modules = dict(layers(module))
    penalty = jnp.zeros(())
    for variable, values in zip(settings.module_variables, parameters["module"], strict=True):
        variable.apply(values, module)
    for path, spec in settings.specs:
        values = parameters["kernels"][path]
        start = _row_scaled(settings, parameters["module"], path, starts[path], spec)
        set_matrix(modules[path], learned_kernel(settings.variables, values, start, spec))
        for part, value in zip(settings.variables, values, strict=True):
            penalty += part.penalty(value, progress)
    return penalty


def _row_scaled(
    settings: Fit, values: Sequence[Any], path: str, start: Start, spec: QuantSpec
) -> Start:
    """A start whose rows are multiplied by what the module variables divide their inputs by."""
    for variable, each in zip(settings.module_variables, values, strict=True):
        start = variable.start(each, path, start, spec)
    return start


def _projected(settings: Fit, parameters: Any) -> Any:
    kernels = {
        path: [v.project(p) for v, p in zip(settings.variables, each, strict=True)]
        for path, each in parameters["kernels"].items()
    }
    return {"kernels": kernels, "module": parameters["module"]}
