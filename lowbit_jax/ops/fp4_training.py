"""Products whose backward passes are MXFP4, rounded stochastically: Quartet's (arXiv:2505.14669).

Forward, y = x W with operands that are on their grids already. Backward, with SR the stochastic
rounding to MXFP4 in groups of 32 along the contraction and H a Hadamard matrix of order 32 behind
random signs, which spreads outliers over a group and leaves every product as it is:

    dx = 16/9 SR(3/4 dy H) SR(3/4 W H)^T           contraction over the outputs
    dW = 16/9 SR(3/4 x^T H') SR(3/4 dy^T H')^T     contraction over the batch

A group's scale is OCP's, 2**(floor(log2 max) - 2), so that its largest magnitude is in [4, 8) units
and saturates at 6 without the factor 3/4; with it nothing does, SR's expectation is its argument,
and the expectation of both products is exact. Left out: speed. The products are those of float32
numbers on the FP4 grid; what trains on such hardware would multiply the codes.
"""

import functools
from typing import Final

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Float

from lowbit_jax.rounding import exp2, exponent_of, positive_zero

GROUP: Final = 32


@functools.lru_cache(maxsize=8)
def _sylvester(order: int) -> np.ndarray:
    """A symmetric orthogonal matrix with entries +-1/sqrt(order); order a power of two."""
    matrix = np.ones((1, 1))
    while len(matrix) < order:
        matrix = np.kron(matrix, np.array([[1.0, 1.0], [1.0, -1.0]]))
    return (matrix / np.sqrt(order)).astype(np.float32)


def block_hadamard(x: Float[Array, "*batch n"], order: int) -> Float[Array, "*batch n"]:
    """Every `order` consecutive elements times a Hadamard matrix; its own inverse.

    Raises:
        ValueError: An order that is no power of two, or does not divide the axis.
    """
    if order < 1 or order & (order - 1) or x.shape[-1] % order:
        raise ValueError(
            f"block_hadamard: blocks of {order} on an axis of length {x.shape[-1]}: needs a power "
            "of two that divides it."
        )
    blocks = x.reshape(*x.shape[:-1], -1, order)
    matrix = jnp.asarray(_sylvester(order), x.dtype)
    return jnp.matmul(blocks, matrix, precision=lax.Precision.HIGHEST).reshape(x.shape)


def stochastic_mxfp4(x: Float[Array, "*batch n"], key: Array) -> Float[Array, "*batch n"]:
    """3/4 of x, rounded stochastically to MXFP4 in groups of 32 along the last axis.

    The expectation over keys is 3/4 x, elementwise; nothing saturates. Values are e2m1's (0, 0.5,
    1, 1.5, 2, 3, 4, 6 and negative) times a power of two of the group; a group of zeros is zeros.

    Args:
        x: float32; the axis is a multiple of 32.
        key: Of this call.
    """
    groups = x.reshape(*x.shape[:-1], -1, GROUP)
    largest = jnp.max(jnp.abs(groups), axis=-1, keepdims=True)
    # Clipped so that units and scales are normal numbers.
    exponent = jnp.clip(exponent_of(largest) - 2, -120, 120)
    v = groups * np.float32(0.75) * exp2(-exponent)
    step = jnp.maximum(exponent_of(v), 0) - 1  # e2m1: one bit of mantissa, subnormals below 1
    noise = jax.random.uniform(key, v.shape, jnp.float32)
    up = jnp.floor(jnp.abs(v) * exp2(-step) + noise) * exp2(step)
    rounded = jnp.where(v < 0, -up, up)
    return positive_zero(rounded * exp2(exponent)).reshape(x.shape)


@jax.custom_vjp
def fp4_backward_product(
    x: Float[Array, "*batch k"], w: Float[Array, "k n"], key: Array
) -> Float[Array, "*batch n"]:
    """x @ w, whose gradients are MXFP4 products, unbiased over keys; as at the top.

    Args:
        x: On its grid, or not: the forward product takes it as it is.
        w: Likewise.
        key: Of this call; a new one at every step.
    """
    return jnp.matmul(x, w, preferred_element_type=x.dtype)


def _fwd(x, w, key):
    return fp4_backward_product(x, w, key), (x, w, key)


def _bwd(residuals, g):
    x, w, key = residuals
    keys = jax.random.split(key, 2)
    flat_g = g.reshape(-1, g.shape[-1]).astype(jnp.float32)
    flat_x = x.reshape(-1, x.shape[-1]).astype(jnp.float32)
    dx = _unbiased(flat_g, w.astype(jnp.float32), keys[0])
    dw = _unbiased(flat_x.T, flat_g.T, keys[1])
    return dx.reshape(x.shape).astype(x.dtype), dw.astype(w.dtype), None


fp4_backward_product.defvjp(_fwd, _bwd)


def _unbiased(a: Float[Array, "m c"], b: Float[Array, "n c"], key: Array) -> Float[Array, "m n"]:
    """An estimate of a b^T from two MXFP4 matrices, whose expectation it is."""
    signs_key, a_key, b_key = jax.random.split(key, 3)
    padding = -a.shape[-1] % GROUP
    a, b = (jnp.pad(m, ((0, 0), (0, padding))) for m in (a, b))
    signs = jax.random.rademacher(signs_key, (1, a.shape[-1]), jnp.float32)
    a_hat = stochastic_mxfp4(block_hadamard(a * signs, GROUP), a_key)
    b_hat = stochastic_mxfp4(block_hadamard(b * signs, GROUP), b_key)
    return jnp.matmul(a_hat, b_hat.T, precision=lax.Precision.HIGHEST) * np.float32(16 / 9)
