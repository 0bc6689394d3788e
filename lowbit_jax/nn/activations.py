"""Activation functions that binary networks train with."""

import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float


class RPReLU(nnx.Module):
    """ReActNet's shifted PReLU (arXiv:2003.03488, section 4.2), per feature.

    y = x - shift_in + shift_out where x > shift_in, else slope (x - shift_in) + shift_out. All
    three are trained. It goes behind layers with the preset `w1a1_reactnet`.

    Attributes:
        shift_in: float32 [features], 0 at the beginning.
        shift_out: float32 [features], 0 at the beginning.
        slope: float32 [features], 0.25 at the beginning.
    """

    def __init__(self, features: int):
        """Takes the length of the last axis of its inputs."""
        self.shift_in = nnx.Param(jnp.zeros(features, jnp.float32))
        self.shift_out = nnx.Param(jnp.zeros(features, jnp.float32))
        self.slope = nnx.Param(jnp.full(features, 0.25, jnp.float32))

    def __call__(self, x: Float[Array, "... n"]) -> Float[Array, "... n"]:
        """The activations, in the dtype of `x`."""
        row = (1,) * (x.ndim - 1) + (-1,)
        shift_in, shift_out, slope = (
            part[...].reshape(row) for part in (self.shift_in, self.shift_out, self.slope)
        )
        shifted = x.astype(jnp.float32) - shift_in
        y = jnp.where(shifted > 0, shifted, slope * shifted) + shift_out
        return y.astype(x.dtype)
