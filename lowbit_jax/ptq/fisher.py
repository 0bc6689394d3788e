"""The diagonal of the Fisher information at a block's output (BRECQ, arXiv:2102.05426, Eq. 10)."""

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array

from lowbit_jax.walk import rebuilt


class _Shifted(nnx.Module):
    """A block with something added to its output."""

    def __init__(self, block: nnx.Module, shift: Array):
        self.block = block
        self.shift = nnx.Variable(shift)

    def __call__(self, x: Array, *args: Any, **kwargs: Any) -> Array:
        return self.block(x, *args, **kwargs) + self.shift[...]  # type: ignore[operator]


def squared_gradients(
    model: nnx.Module,
    block: str,
    batches: Sequence[Any],
    forward: Callable[[nnx.Module, Any], Any],
    key: Array,
    outputs: Sequence[Array],
) -> list[Array]:
    """Squared gradients of the negative log-likelihood at a block's output, scaled to mean one.

    Labels are drawn from the model's own predictions, which makes it the Fisher information and
    not its "empirical" form, and needs no labels.

    Args:
        model: The float model; `forward` returns logits [..., classes].
        block: Path of the block.
        batches: The calibration batches.
        forward: Runs the model on a batch.
        key: Of the labels.
        outputs: What leaves the block, batch by batch, for its shape.

    Returns: One array a batch, shaped like the block's output.
    """

    @jax.jit
    def gradient(state: Any, batch: Any, shift: Array, key: Array) -> Array:
        def loss(shift: Array) -> Array:
            copy = nnx.merge(graphdef, state)
            shifted = rebuilt(copy, lambda path, m: _Shifted(m, shift) if path == block else m)
            log_p = jax.nn.log_softmax(forward(shifted, batch).astype(jnp.float32))
            labels = jax.random.categorical(key, jax.lax.stop_gradient(log_p))
            return -jnp.sum(jnp.take_along_axis(log_p, labels[..., None], axis=-1))

        return jax.grad(loss)(shift) ** 2

    graphdef, state = nnx.split(model)
    found = [
        gradient(state, batch, jnp.zeros_like(y), jax.random.fold_in(key, number))
        for number, (batch, y) in enumerate(zip(batches, outputs, strict=True))
    ]
    mean = sum(float(f.mean()) for f in found) / len(found)
    return [f / jnp.maximum(mean, 1e-30) for f in found]
