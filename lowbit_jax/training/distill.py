"""Distillation from a float teacher: both distributions softened, one pulled to the other.

loss = (1 - weight) * nll + weight * T^2 * KL(softmax(teacher / T) || softmax(student / T))

after Hinton et al. (arXiv:1503.02531, section 2), whose T^2 keeps the two gradients in proportion
when T changes.
Deviation: the divergence is a mean over tokens, as the nll is.
"""

from typing import Any, NamedTuple, Self

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int32


class Teacher(NamedTuple):
    """A frozen float model, taken apart so that its weights can be an argument of the step."""

    graphdef: Any
    state: Any
    temperature: float
    weight: float

    @classmethod
    def of(cls, model: nnx.Module, *, temperature: float, weight: float) -> Self:
        """The teacher that a loaded model makes."""
        return cls(*nnx.split(model), temperature, weight)


def divergence(
    student: Float[Array, "batch length vocab"],
    teacher: Float[Array, "batch length vocab"],
    temperature: float,
) -> Float[Array, ""]:
    """Mean over tokens of KL(teacher || student) at `temperature`, in nats."""
    scale = 1.0 / temperature
    log_p = jax.nn.log_softmax(teacher.astype(jnp.float32) * scale)
    log_q = jax.nn.log_softmax(student.astype(jnp.float32) * scale)
    return jnp.sum(jnp.exp(log_p) * (log_p - log_q), axis=-1).mean()


def distillation_loss(
    nll: Float[Array, ""],
    logits: Float[Array, "batch length vocab"],
    inputs: Int32[Array, "batch length"],
    teacher: Teacher,
    teacher_state: Any,
) -> Float[Array, ""]:
    """The loss above; `nll` and `logits` are the student's, `inputs` what it saw."""
    expected = jax.lax.stop_gradient(nnx.merge(teacher.graphdef, teacher_state)(inputs))
    soft = divergence(logits, expected, teacher.temperature)
    return (1.0 - teacher.weight) * nll + teacher.weight * teacher.temperature**2 * soft
