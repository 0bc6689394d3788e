"""The train step: one pure, jitted function from (state, batch) to (state, metrics).

State is split once into what is differentiated (`nnx.Param`), everything else the model holds
(statistics, random streams) and the optimizer's; Python is not entered again until the metrics are
read.
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from flax import nnx
from jaxtyping import Array, Float, Int32

import lowbit_jax as lb
from lowbit_jax.evaluation.losses import cross_entropy
from lowbit_jax.training.distill import Teacher, distillation_loss

Tokens = Int32[Array, "batch length"]


class TrainState(NamedTuple):
    """Everything a step changes; a checkpoint is exactly this.

    params: The model's nnx.Param leaves.
    rest: All its other leaves: quantizer statistics, random streams.
    opt: The optimizer's state, its step counts included.
    """

    params: Any
    rest: Any
    opt: Any


class Metrics(NamedTuple):
    """Of one step: mean loss in nats per token, and the gradient's norm before clipping."""

    loss: Float[Array, ""]
    grad_norm: Float[Array, ""]


def split(model: nnx.Module, optimizer: optax.GradientTransformation) -> tuple[Any, TrainState]:
    """`(graphdef, state)` of a model before its first step."""
    graphdef, params, rest = nnx.split(model, nnx.Param, ...)
    return graphdef, TrainState(params, rest, optimizer.init(params))


def merge(graphdef: Any, state: TrainState) -> nnx.Module:
    """The model a state describes."""
    return nnx.merge(graphdef, state.params, state.rest)


def observed(graphdef: Any, params: Any, rest: Any) -> Any:
    """`rest` with the statistics of kernels that follow their updated weights."""
    model = nnx.merge(graphdef, params, rest, copy=True)
    if not lb.surgery.has_kernel_statistics(model):
        return rest
    return nnx.split(lb.surgery.observe_kernels(model), nnx.Param, ...)[2]


def make_train_step(
    graphdef: Any,
    optimizer: optax.GradientTransformation,
    *,
    accumulate: int = 1,
    teacher: Teacher | None = None,
    shardings: Any = None,
) -> Callable[..., tuple[TrainState, Metrics]]:
    """`step(state, windows) -> (state, metrics)`, compiled, its first argument donated.

    Args:
        graphdef: From `split`.
        optimizer: The one `split` was given.
        accumulate: Parts that the batch is cut into; gradients are averaged over them, so that the
            update is the one of the whole batch up to the order of float32 sums.
        teacher: Adds its divergence to the loss; its weights are an argument of the compiled step,
            not constants in it.
        shardings: Of the returned state; None: as the compiler finds.
    Returns: The step; windows are int32 [batch, length + 1], inputs and targets in one.
    """

    def loss_of(params: Any, rest: Any, windows: Tokens, teacher_state: Any) -> Any:
        # A copy, because `rest` is no argument that JAX traces here, and the model may write to it.
        model = nnx.merge(graphdef, params, rest, copy=True)
        logits = model(windows[:, :-1])
        loss = cross_entropy(logits, windows[:, 1:])
        if teacher is not None:
            loss = distillation_loss(loss, logits, windows[:, :-1], teacher, teacher_state)
        return loss, nnx.split(model, nnx.Param, ...)[2]

    value_and_grad = jax.value_and_grad(loss_of, has_aux=True)

    def gradients(state: TrainState, windows: Tokens, teacher_state: Any) -> Any:
        if accumulate == 1:
            return value_and_grad(state.params, state.rest, windows, teacher_state)
        # Parts take every accumulate-th row, so that each device keeps the rows it already holds.
        parts = windows.reshape(-1, accumulate, windows.shape[-1]).swapaxes(0, 1)

        def one_part(carry: Any, part: Tokens) -> Any:
            loss, rest, grads = carry
            (part_loss, rest), part_grads = value_and_grad(state.params, rest, part, teacher_state)
            return (loss + part_loss, rest, jax.tree.map(jnp.add, grads, part_grads)), None

        zeros = jax.tree.map(jnp.zeros_like, state.params)
        (loss, rest, grads), _ = jax.lax.scan(one_part, (jnp.float32(0), state.rest, zeros), parts)
        return (loss / accumulate, rest), jax.tree.map(lambda g: g / accumulate, grads)

    def step(state: TrainState, windows: Tokens, teacher_state: Any) -> Any:
        (loss, rest), grads = gradients(state, windows, teacher_state)
        updates, opt = optimizer.update(grads, state.opt, state.params)
        params = optax.apply_updates(state.params, updates)
        rest = observed(graphdef, params, rest)
        return TrainState(params, rest, opt), Metrics(loss, optax.global_norm(grads))

    jit = functools.partial(jax.jit, donate_argnums=0)
    compiled = jit(step) if shardings is None else jit(step, out_shardings=(shardings, None))
    teacher_state = None if teacher is None else teacher.state
    return lambda state, windows: compiled(state, windows, teacher_state)
