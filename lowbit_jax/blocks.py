"""The blocks of a granularity, as a reshape: a block lies along axes where its scale has length 1.

An axis that one block covers, or whose blocks have one element, needs no reshape: per-tensor and
per-channel views cost nothing, and only groups split an axis in two.
"""

import dataclasses
from collections.abc import Callable

import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array

from lowbit_jax.rounding import flushed
from lowbit_jax.spec import Block, QuantSpec


@dataclasses.dataclass(frozen=True)
class BlockView:
    """How an array of `shape` is split so that a scale broadcasts against it at equal rank.

    Attributes:
        shape: Shape of the array.
        scale_shape: Shape of its scale, of the same rank.
        split_shape: Shape of the split array.
        split_scale_shape: Shape of the split scale; 1 along every axis of `block_axes`.
        block_axes: Axes of the split array that run inside a block, K first.
    """

    shape: tuple[int, ...]
    scale_shape: tuple[int, ...]
    split_shape: tuple[int, ...]
    split_scale_shape: tuple[int, ...]
    block_axes: tuple[int, ...]

    @classmethod
    def of(cls, shape: tuple[int, ...], spec: QuantSpec) -> "BlockView":
        """The view of an array of this shape; raises like `QuantSpec.scale_shape`."""
        scale_shape = spec.scale_shape(shape)
        lead = len(shape) - len(spec.granularity.sizes(shape))
        split, split_scale, axes = list(shape[:lead]), list(shape[:lead]), []
        for length, blocks in zip(shape[lead:], scale_shape[lead:], strict=True):
            if blocks == length:  # one element a block
                split.append(length)
                split_scale.append(length)
            elif blocks == 1:
                axes.append(len(split))
                split.append(length)
                split_scale.append(1)
            else:
                axes.append(len(split) + 1)
                split += [blocks, length // blocks]
                split_scale += [blocks, 1]
        return cls(tuple(shape), scale_shape, tuple(split), tuple(split_scale), tuple(axes))

    @property
    def block_size(self) -> int:
        """Elements that share one scale."""
        size = 1
        for axis in self.block_axes:
            size *= self.split_shape[axis]
        return size

    def split(self, x: Array) -> Array:
        """The array in the split shape."""
        return x.reshape(self.split_shape)

    def split_scale(self, scale: Array) -> Array:
        """A scale in the split shape, which broadcasts against the split array."""
        return scale.reshape(self.split_scale_shape)

    def spread(self, scale: Array) -> Array:
        """The scale of every element, in the shape of the array."""
        return self.merge(jnp.broadcast_to(self.split_scale(scale), self.split_shape))

    def merge(self, x: Array) -> Array:
        """The inverse of `split`."""
        return x.reshape(self.shape)

    def reduce(self, f: Callable[..., Array], x: Array) -> Array:
        """`f(x, axis=..., keepdims=True)` over every block, in the shape of the scale."""
        return f(self.split(x), axis=self.block_axes, keepdims=True).reshape(self.scale_shape)


def reduce_matrix(f: Callable[..., Array], x: Array, spec: QuantSpec) -> Array:
    """`f` over every trailing matrix (Block) or row (PerToken), with its axes kept at length 1."""
    axes = (-2, -1) if isinstance(spec.granularity, Block) else (-1,)
    return f(x, axis=axes, keepdims=True)


def pinned(x: Array) -> Array:
    """`x`, with no algebra across it.

    XLA reassociates products and quotients with constants, so that a scale would differ in its last
    bit between eager, jitted and fused programs; scales are small, and pinning them costs nothing.
    """
    return lax.optimization_barrier(x)


def divided(x: Array, scale: Array) -> Array:
    """x / scale of equal rank, as x times the float32 reciprocal of the scale.

    XLA makes this of a division by a broadcast array (which changes the last bit of every fourth
    quotient), but not of one by an array of the shape of `x`; written out, every program and every
    other implementation can compute the same quotient. Exact where the scale is a power of two.
    Subnormal elements are zeros.
    """
    return flushed(x) * pinned(jnp.ones_like(scale) / scale)


def rounded_cast(x: Array, dtype: jnp.dtype) -> Array:
    """float32 to `dtype`, rounded once, even where XLA keeps "excess precision" in a fusion."""
    if dtype == jnp.bfloat16:
        x = lax.reduce_precision(x, exponent_bits=8, mantissa_bits=7)
    elif dtype == jnp.float16:
        # reduce_precision flushes what float16 holds as subnormal numbers: multiples of 2**-24.
        subnormal = jnp.round(x * np.float32(2.0**24)) * np.float32(2.0**-24)
        normal = lax.reduce_precision(x, exponent_bits=5, mantissa_bits=10)
        x = jnp.where(jnp.abs(x) < np.float32(2.0**-14), subnormal, normal)
    return x.astype(dtype)
