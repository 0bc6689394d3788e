"""The matrix view [..., K, N] of every layer's kernel: K the contraction, N the outputs, leading
axes a stack.

| layer | kernel | stack | K | N |
|---|---|---|---|---|
| Linear | [in, out] | | in | out |
| LinearGeneral | [batch.., in.., out..] | batch axes | input axes | output axes |
| Einsum | by letters | shared with input and output | shared with the input only | the others |
| Conv | [window.., in / groups, out] | groups | window and channels | out / groups |
| Embed | [vocabulary, features] | | features | vocabulary |

Axes in front of a kernel's own (scanned layers, experts) are more stack.
"""

import dataclasses
import math
from typing import Any

import jax.numpy as jnp
from jaxtyping import Array

from lowbit_jax.ops.fp4_training import block_hadamard


@dataclasses.dataclass(frozen=True)
class MatrixView:
    """A kernel as a matrix: split axes, bring them into the order (stack, K, N), merge K and N.

    Attributes:
        kernel_shape: The kernel's own shape, without leading axes.
        split_shape: The same with some axes split in two (the groups of a convolution).
        order: Permutation of the split axes to (stack.., K.., N..).
        stack_axes: How many of them are stack.
        k_axes: How many of them are K.
        hadamard: Order of the Hadamard rotation of consecutive rows of the matrix; 0: none.
    """

    kernel_shape: tuple[int, ...]
    split_shape: tuple[int, ...]
    order: tuple[int, ...]
    stack_axes: int
    k_axes: int
    hadamard: int = 0

    @property
    def matrix_shape(self) -> tuple[int, ...]:
        """Shape (stack.., K, N) of the view, without leading axes."""
        sizes = [self.split_shape[axis] for axis in self.order]
        s, k = self.stack_axes, self.stack_axes + self.k_axes
        return (*sizes[:s], math.prod(sizes[s:k]), math.prod(sizes[k:]))

    def lead(self, ndim: int) -> int:
        """How many leading axes a kernel of this rank has."""
        return ndim - len(self.kernel_shape)

    def to_matrix(self, kernel: Array) -> Array:
        """Kernel [lead.., own..] to matrix [lead.., stack.., K, N]."""
        lead = kernel.shape[: self.lead(kernel.ndim)]
        x = kernel.reshape(*lead, *self.split_shape)
        if self.order != tuple(range(len(self.order))):
            x = x.transpose(*range(len(lead)), *(len(lead) + axis for axis in self.order))
        return self._rotated(x.reshape(*lead, *self.matrix_shape))

    def _rotated(self, matrix: Array) -> Array:
        if not self.hadamard:
            return matrix
        rows = block_hadamard(matrix.astype(jnp.float32).swapaxes(-1, -2), self.hadamard)
        return rows.swapaxes(-1, -2).astype(matrix.dtype)

    def from_matrix(self, matrix: Array) -> Array:
        """The inverse of `to_matrix`."""
        matrix = self._rotated(matrix)
        lead = matrix.shape[: matrix.ndim - self.stack_axes - 2]
        x = matrix.reshape(*lead, *(self.split_shape[axis] for axis in self.order))
        if self.order != tuple(range(len(self.order))):
            inverse = sorted(range(len(self.order)), key=self.order.__getitem__)
            x = x.transpose(*range(len(lead)), *(len(lead) + axis for axis in inverse))
        return x.reshape(*lead, *self.kernel_shape)

    def expand_scale(self, scale: Array, ndim: int) -> Array:
        """A scale [lead.., stack.., 1, 1 or N] in the kernel's layout, 1 along the axes of K.

        Args:
            scale: One per tensor or per channel.
            ndim: Rank of the kernel.
        """
        lead = scale.shape[: self.lead(ndim)]
        s, k = self.stack_axes, self.stack_axes + self.k_axes
        stack = [self.split_shape[axis] for axis in self.order[:s]]
        n = [self.split_shape[axis] if scale.shape[-1] > 1 else 1 for axis in self.order[k:]]
        x = scale.reshape(*lead, *stack, *([1] * self.k_axes), *n)
        inverse = sorted(range(len(self.order)), key=self.order.__getitem__)
        x = x.transpose(*range(len(lead)), *(len(lead) + axis for axis in inverse))
        if len(self.split_shape) != len(self.kernel_shape):
            raise NotImplementedError("a scale cannot be laid over a kernel whose axes were split.")
        return x


def linear_view(layer: Any) -> MatrixView:
    """The view of `nnx.Linear`: its kernel as it is."""
    shape = tuple(layer.kernel.shape[-2:])
    return MatrixView(shape, shape, (0, 1), 0, 1)


def linear_general_view(layer: Any) -> MatrixView:
    """The view of `nnx.LinearGeneral`: batch, input and output axes, in the kernel's order."""
    stack, k = len(layer.batch_axis), len(layer.axis)
    rank = stack + k + len(layer.out_features)
    shape = tuple(layer.kernel.shape[-rank:])
    return MatrixView(shape, shape, tuple(range(rank)), stack, k)


def einsum_letters(einsum_str: str) -> tuple[str, str, str]:
    """Letters of input, kernel and output of an equation like `btd,dhk->bthk`, without `...`."""
    inputs, output = einsum_str.replace(" ", "").replace("...", "").split("->")
    x, kernel = inputs.split(",")
    return x, kernel, output


def input_positions(einsum_str: str, ndim: int) -> dict[str, int]:
    """Where each letter of an equation's input stands in an input of this rank."""
    term = einsum_str.replace(" ", "").split(",")[0]
    # Letters count from the end, unless `...` stands behind them.
    head, _, tail = term.partition("...")
    positions = {c: i for i, c in enumerate(head)}
    return positions | {c: ndim - len(tail) + i for i, c in enumerate(tail)}


def einsum_view(layer: Any) -> MatrixView:
    """The view of `nnx.Einsum`, from the letters of its equation.

    Raises:
        ValueError: The layer has no equation of its own, or no letter is contracted.
    """
    if layer.einsum_str is None:
        raise ValueError(
            "an Einsum without an equation of its own (einsum_str=None) has no fixed contraction. "
            "Give it one, or leave the layer float."
        )
    x, kernel, output = einsum_letters(layer.einsum_str)
    stack = [i for i, c in enumerate(kernel) if c in x and c in output]
    k = [i for i, c in enumerate(kernel) if c in x and c not in output]
    n = [i for i, c in enumerate(kernel) if c not in x]
    if not k:
        raise ValueError(f"the equation {layer.einsum_str!r} contracts no axis of its kernel.")
    shape = tuple(layer.kernel.shape[-len(kernel) :])
    return MatrixView(shape, shape, (*stack, *k, *n), len(stack), len(k))


def conv_view(layer: Any) -> MatrixView:
    """The view of `nnx.Conv`: window and channels contracted, groups a stack."""
    rank = len(layer.kernel_size) + 2
    shape = tuple(layer.kernel.shape[-rank:])
    groups = layer.feature_group_count
    if groups == 1:
        return MatrixView(shape, shape, tuple(range(rank)), 0, rank - 1)
    split = (*shape[:-1], groups, shape[-1] // groups)
    order = (rank - 1, *range(rank - 1), rank)
    return MatrixView(shape, split, order, 1, rank - 1)


def embed_view(layer: Any) -> MatrixView:
    """The view of `nnx.Embed`: features as K, so that lookup and tied head share one array."""
    shape = tuple(layer.embedding.shape[-2:])
    return MatrixView(shape, shape, (1, 0), 0, 1)
