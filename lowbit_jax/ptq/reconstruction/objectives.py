"""Objectives: how far a module's output is from what it should be. All are hashable callables."""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array

from lowbit_jax.ptq.chain import call_block
from lowbit_jax.ptq.reconstruction.dropping import draw


@dataclasses.dataclass(frozen=True)
class OutputError:
    """Mean over tokens of the squared error of a block's output, summed over features.

    With Fisher weights (BRECQ, arXiv:2102.05426, Eq. 10) every squared difference counts by the
    squared gradient of the task's loss at that output, scaled to a mean of one.

    Attributes:
        static: The block's further arguments that are no arrays; see `chain.Rest`.
        dropped: Share of the block's inputs that are those of the float model, and of activations
            in it that are not quantized, elementwise (QDrop, arXiv:2203.05740).
    """

    static: Any
    dropped: float = 0.0

    def __call__(self, block: nnx.Module, samples: Any, context: Any, key: Array) -> Array:
        """`samples`: {"x", "y"} and maybe "x_float", "fisher"; `context`: further arrays."""
        x = samples["x"]
        if self.dropped:
            mask_key, draw_key = jax.random.split(key)
            draw(block, draw_key)
            mask = jax.random.bernoulli(mask_key, self.dropped, x.shape)
            x = jnp.where(mask, samples["x_float"], x)
        y = call_block(block, x, context, self.static)
        error = (y - samples["y"]) ** 2
        if "fisher" in samples:
            error = error * samples["fisher"]
        return jnp.mean(jnp.sum(error, axis=-1))


@dataclasses.dataclass(frozen=True)
class Divergence:
    """Mean over tokens of KL(float model || quantized model), in nats.

    Attributes:
        forward: Runs a model on a batch; returns logits [..., classes].
        graphdef: Structure of the float model, whose state is the context.
    """

    forward: Callable[[nnx.Module, Any], Any]
    graphdef: Any

    def __call__(self, model: nnx.Module, samples: Any, context: Any, key: Array) -> Array:
        """`samples`: a batch; `context`: the float model's state."""
        teacher = jax.lax.stop_gradient(self.forward(nnx.merge(self.graphdef, context), samples))
        log_p = jax.nn.log_softmax(teacher.astype(jnp.float32))
        log_q = jax.nn.log_softmax(self.forward(model, samples).astype(jnp.float32))
        return jnp.mean(jnp.sum(jnp.exp(log_p) * (log_p - log_q), axis=-1))
