"""Gradient rules of rounding, each a jax.custom_vjp: the forward value is exactly on the grid.

`x + stop_gradient(q - x)` is not `q`: 2 to 4 % of the elements land off the grid in float32 and
bfloat16.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from lowbit_jax.blocks import divided
from lowbit_jax.formats import IntGrid


@jax.custom_vjp
def ste(x: Float[Array, "*n"], x_hat: Float[Array, "*n"]) -> Float[Array, "*n"]:
    """The value of `x_hat`, the gradient of `x`: straight-through (arXiv:1308.3432)."""
    return x_hat


def _ste_fwd(x, x_hat):
    return x_hat, None


def _ste_bwd(_, g):
    return g, None


ste.defvjp(_ste_fwd, _ste_bwd)


@functools.partial(jax.custom_vjp, nondiff_argnums=(2,))
def lsq(x: Float[Array, "*n"], scale: Float[Array, "*#n"], fmt: IntGrid) -> Float[Array, "*n"]:
    """Snaps `x` to `scale * {qmin..qmax}` with a learned scale (LSQ, arXiv:1902.08153).

    The gradient of `x` passes inside the range (Eq. 5); that of `scale` is Eq. 3, summed over the
    elements that share it. The gradient factor of section 2.2 is the caller's: see
    `scaled_gradient`.

    Args:
        x: float32.
        scale: Positive; of the rank of `x`, 1 where shared.
        fmt: The integers.
    """
    return fmt.round(divided(x, scale)) * scale


def _lsq_fwd(x, scale, fmt):
    return lsq(x, scale, fmt), (x, scale)


def _lsq_bwd(fmt, residuals, g):
    x, scale = residuals
    v = divided(x, scale)
    qmin, qmax = np.float32(fmt.qmin), np.float32(fmt.qmax)
    inside = (v > qmin) & (v < qmax)
    d_scale = jnp.where(inside, fmt.round(v) - v, jnp.clip(v, qmin, qmax))  # Eq. 3
    shared = tuple(axis for axis, n in enumerate(scale.shape) if n == 1)
    return (
        jnp.where(inside, g, jnp.zeros_like(g)),  # Eq. 5
        jnp.sum(g * d_scale, shared, keepdims=True),
    )


lsq.defvjp(_lsq_fwd, _lsq_bwd)


@functools.partial(jax.custom_vjp, nondiff_argnums=(1,))
def scaled_gradient(x: Float[Array, "*n"], factor: float) -> Float[Array, "*n"]:
    """`x`, with its gradient multiplied by `factor` (LSQ's section 2.2)."""
    return x


def _scaled_gradient_fwd(x, factor):
    return x, None


def _scaled_gradient_bwd(factor, _, g):
    return (g * np.float32(factor),)


scaled_gradient.defvjp(_scaled_gradient_fwd, _scaled_gradient_bwd)


@jax.custom_vjp
def surrogate(x_hat: Array, operands: dict[str, Array], slopes: dict[str, Array]) -> Array:
    """The value of `x_hat`, whose derivative by every operand is said to be that of `slopes`.

    The gradient of an operand is `g * slope`, summed over the axes along which the operand has
    length 1: most training-time quantizers are a rounding and a table of such slopes.

    Args:
        x_hat: float32.
        operands: float32 arrays of the rank of `x_hat`, 1 where shared.
        slopes: One per operand, each broadcasting to the shape of `x_hat`.
    """
    return x_hat


def _surrogate_fwd(x_hat, operands, slopes):
    return x_hat, (operands, slopes)


def _surrogate_bwd(residuals, g):
    operands, slopes = residuals

    def gradient(operand, slope):
        each = g * slope
        sizes = zip(operand.shape, each.shape, strict=True)
        shared = tuple(axis for axis, (n, full) in enumerate(sizes) if n == 1 and full != 1)
        return jnp.sum(each, shared, keepdims=True) if shared else each

    zeros = jax.tree.map(jnp.zeros_like, slopes)
    return jnp.zeros_like(g), {k: gradient(v, slopes[k]) for k, v in operands.items()}, zeros


surrogate.defvjp(_surrogate_fwd, _surrogate_bwd)


@functools.partial(jax.custom_vjp, nondiff_argnums=(4,))
def generalized_ste(
    x_hat: Float[Array, "*n"],
    x: Float[Array, "*n"],
    intervals: Float[Array, " steps"],
    scale: Float[Array, "1"],
    smallest: float,
) -> Float[Array, "*n"]:
    """The value of `x_hat`; N2UQ's gradients by x, by the lengths of its intervals and the scale.

    G-STE (arXiv:2111.14826): inside interval i, from d = a_1 + .. + a_(i-1) on, the derivatives are
    those of `scale * (i - 1 + (x - d) / a_i)`, the expectation of rounding stochastically: by x
    scale / a_i, by a_i -scale (x - d) / a_i**2, by an earlier length -scale / a_i. Outside all
    intervals those are 0. By the scale it is the code, x_hat / scale.

    Args:
        x_hat: The value; its own gradient is zero.
        x: float32.
        intervals: Their lengths a, float32.
        scale: Of one code.
        smallest: What shorter lengths count as; their gradient is passed on.
    """
    return x_hat


def _generalized_fwd(x_hat, x, intervals, scale, smallest):
    return x_hat, (x_hat, x, jnp.maximum(intervals, np.float32(smallest)), scale)


def _generalized_bwd(smallest, residuals, g):
    x_hat, x, lengths, scale = residuals
    s, d = scale[0], jnp.zeros((), jnp.float32)
    dx, by_length = jnp.zeros_like(g), []
    for i in range(lengths.shape[0]):
        inside = (x >= d) & (x < d + lengths[i])
        each = jnp.where(inside, g, 0.0) * (s / lengths[i])
        dx = dx + each
        own = -jnp.sum(each * (x - d)) / lengths[i]
        total = jnp.sum(each)
        by_length = [earlier - total for earlier in by_length] + [own]
        d = d + lengths[i]
    return (
        jnp.zeros_like(g),
        dx,
        jnp.stack(by_length),
        jnp.sum(g * (x_hat / s)).reshape(1),
    )


generalized_ste.defvjp(_generalized_fwd, _generalized_bwd)


@functools.partial(jax.custom_vjp, nondiff_argnums=(2,))
def quantized_gradient(x: Float[Array, "*n"], key: Array, bits: int) -> Float[Array, "*n"]:
    """`x`, with its gradient rounded stochastically to `bits` bits.

    DoReFa-Net (arXiv:1606.06160, Eq. 12): of a gradient g,
    `2 max|g| (quantize(g / (2 max|g|) + 1/2 + N) - 1/2)` with N uniform in
    `[-1/2, 1/2] / (2**bits - 1)` and quantize the nearest multiple of `1 / (2**bits - 1)`: the
    expectation over keys is g. The maximum is over all axes but the first, that of the batch.

    Args:
        x: Of any shape.
        key: Of this call; a new one at every step.
        bits: Of the gradient, 1 to 16.

    Raises:
        ValueError: Bits outside 1 to 16.
    """
    if not 1 <= bits <= 16:
        raise ValueError(f"quantized_gradient: bits={bits} is not in 1 to 16.")
    return x


def _quantized_gradient_fwd(x, key, bits):
    return quantized_gradient(x, key, bits), key


def _quantized_gradient_bwd(bits, key, g):
    steps = np.float32(2**bits - 1)
    g32 = g.astype(jnp.float32)
    largest = jnp.max(jnp.abs(g32), axis=tuple(range(1, g.ndim)) or None, keepdims=True)
    largest = jnp.maximum(largest, np.float32(2.0**-100))
    unit = g32 / (2 * largest) + np.float32(0.5)  # in [0, 1]
    # floor(v + U[0, 1)) is the nearest integer of v plus noise of +-1/2.
    level = jnp.floor(unit * steps + jax.random.uniform(key, g.shape, jnp.float32))
    level = jnp.clip(level, 0.0, steps)
    return ((2 * largest) * (level * np.float32(1 / steps) - np.float32(0.5))).astype(g.dtype), None


quantized_gradient.defvjp(_quantized_gradient_fwd, _quantized_gradient_bwd)
