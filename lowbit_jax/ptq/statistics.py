"""Second moments of what enters a layer: the Hessian of its squared output error.

For a layer with rows X and kernel W, ||X W - X V||^2 = tr((W - V)^T H (W - V)) with H = X^T X: H is
all that a layer-wise solver needs of the data. It is averaged over tokens, in float32.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from lowbit_jax.ptq.chain import Chain
from lowbit_jax.ptq.taps import Rows, fold, fold_both


class Moments(NamedTuple):
    """Sums over tokens; `hessian` and `drift` become means by dividing by `tokens`.

    Attributes:
        hessian: Sum of x x^T [stack.., K, K].
        drift: Sum of (x_float - x) x^T of the same shape; None without error propagation.
        tokens: Rows that are not all zero [stack..]: an expert's padding does not count.
    """

    hessian: Float[Array, "*stack k k"]
    drift: Float[Array, "*stack k k"] | None
    tokens: Array


def moments(block: nnx.Module, chain: Chain, matrices: dict[str, Array]) -> dict[str, Moments]:
    """Moments of the inputs of layers.

    Args:
        block: With quantized activations, if any.
        chain: What enters it.
        matrices: The layers' kernels by path, for their shapes.
    """
    zeros = {path: _zeros(matrix, drift=False) for path, matrix in matrices.items()}
    return fold(block, chain, list(matrices), _add, zeros)


def moments_with_drift(
    blocks: tuple[nnx.Module, nnx.Module],
    chains: tuple[Chain, Chain],
    matrices: dict[str, Array],
) -> dict[str, Moments]:
    """Moments and drift of the inputs of layers.

    Args:
        blocks: The float block and the one with what is quantized so far.
        chains: What enters each.
        matrices: The layers' kernels by path, for their shapes.
    """
    zeros = {path: _zeros(matrix, drift=True) for path, matrix in matrices.items()}
    return fold_both(blocks, chains, list(matrices), _add_both, zeros)


def _zeros(matrix: Array, *, drift: bool) -> Moments:
    *stack, k, _ = matrix.shape
    square = jnp.zeros((*stack, k, k), jnp.float32)
    return Moments(square, square if drift else None, jnp.zeros(stack, jnp.float32))


def _gram(x: Array, y: Array) -> Array:
    return jnp.einsum("...ti,...tj->...ij", x, y, precision=jax.lax.Precision.HIGHEST)


def _tokens(x: Array) -> Array:
    return jnp.sum(jnp.any(x != 0, axis=-1), axis=-1).astype(jnp.float32)


def _add(rows: Rows, carry: Any) -> Any:
    return {
        path: Moments(m.hessian + _gram(x, x), None, m.tokens + _tokens(x))
        for path, x, m in _zipped(rows, carry)
    }


def _add_both(floats: Rows, rows: Rows, carry: Any) -> Any:
    return {
        path: Moments(
            m.hessian + _gram(x, x), m.drift + _gram(floats[path] - x, x), m.tokens + _tokens(x)
        )
        for path, x, m in _zipped(rows, carry)
    }


def _zipped(rows: Rows, carry: dict[str, Moments]) -> Sequence[tuple[str, Array, Any]]:
    return [(path, rows[path], m) for path, m in carry.items()]


@jax.jit
def output_error(
    weight: Float[Array, "*stack k n"],
    weight_hat: Float[Array, "*stack k n"],
    hessian: Float[Array, "*stack k k"],
) -> Array:
    """Relative squared error of a layer's output, ||X W - X V||^2 / ||X W||^2."""
    difference = weight - weight_hat
    return _energy(difference, hessian) / jnp.maximum(_energy(weight, hessian), 1e-30)


@jax.jit
def weight_error(weight: Array, weight_hat: Array) -> Array:
    """Relative squared error of a kernel, ||W - V||^2 / ||W||^2."""
    return jnp.sum((weight - weight_hat) ** 2) / jnp.maximum(jnp.sum(weight**2), 1e-30)


def _energy(weight: Array, hessian: Array) -> Array:
    return jnp.sum(weight * jnp.matmul(hessian, weight, precision=jax.lax.Precision.HIGHEST))
