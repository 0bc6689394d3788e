"""What the training-time quantizers of the papers share: a rounding, and a table of slopes."""

import abc
import dataclasses
from typing import Any, ClassVar, override

import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Float

from lowbit_jax.blocks import BlockView, rounded_cast
from lowbit_jax.estimators import surrogate
from lowbit_jax.formats import Format
from lowbit_jax.grid import Range, snap
from lowbit_jax.qtensor import QTensor, encode
from lowbit_jax.quantizers.base import Quantizer, State


class Reshaped(Quantizer):
    """A quantizer that rounds a function of the array, with gradients that its paper gives.

    Always: the value is the nearest one of the grid to `reshaped(x)`, and the derivatives by the
    array and by every trainable leaf are those of `slopes`. Finals say the three formulas.
    """

    shared_part: ClassVar[bool] = True
    takes: ClassVar[tuple[Format, ...] | None] = None
    """The formats it is defined for; None: any."""

    @override
    def __post_init__(self):
        super().__post_init__()
        name = type(self).__name__
        if self.takes is not None and self.spec.format not in self.takes:
            known = [fmt.name for fmt in self.takes]
            raise NotImplementedError(
                f"{name}: its paper defines it for {known}, not for {self.spec.format.name}."
            )
        if self.spec.has_global_scale:
            raise NotImplementedError(f"{name}: one scale level only; NVFP4's ranges are Absmax's.")

    def reshaped(self, x: Float[Array, "..."], state: State, range_: Range) -> Array:
        """The float32 array that is rounded to the nearest; default: the array."""
        return x

    @abc.abstractmethod
    def slopes(
        self, x: Float[Array, "..."], x_hat: Array, state: State, range_: Range
    ) -> dict[str, Array]:
        """Derivatives by "x" and by every trainable leaf, per element, float32."""

    @override
    def fake_quant(self, x: Float[Array, "..."], state: State) -> Float[Array, "..."]:
        view = BlockView.of(x.shape, self.spec)
        x32 = x.astype(jnp.float32)
        constant, fixed = lax.stop_gradient((x32, state))
        range_ = self.range(constant, fixed)
        x_hat = snap(self.reshaped(constant, fixed, range_), self.spec, range_)
        slopes = self.slopes(constant, x_hat, fixed, range_)
        operands = {"x": view.split(x32)}
        for name in self.trainable:
            operands[name] = self._operand(state[name].astype(jnp.float32), view)
        slopes = {name: view.split(jnp.broadcast_to(s, x.shape)) for name, s in slopes.items()}
        return rounded_cast(view.merge(surrogate(view.split(x_hat), operands, slopes)), x.dtype)

    def _operand(self, leaf: Array, view: BlockView) -> Array:
        """A trainable leaf in the split shape."""
        if leaf.shape == view.scale_shape:
            return view.split_scale(leaf)
        return jnp.reshape(leaf, (1,) * (len(view.split_shape) - leaf.ndim) + leaf.shape)

    @override
    def freeze(self, x: Float[Array, "..."], state: State) -> QTensor:
        x32 = x.astype(jnp.float32)
        range_ = self.range(x32, state)
        q = encode(self.reshaped(x32, state, range_), self.spec, range_)
        return dataclasses.replace(q, dtype=x.dtype)


def constant_range(x: Any, quantizer: Quantizer, scale: float) -> Range:
    """The range with one scale for every block."""
    full = jnp.full(quantizer.spec.scale_shape(x.shape), scale, jnp.float32)
    return Range(quantizer.spec.scale_format.round(full))


def inside(x: Array, range_: Range, quantizer: Quantizer) -> Array:
    """1 where `x` is within the ends of its block's grid, 0 where it saturates; float32."""
    end = expand(range_.scale * np.float32(quantizer.spec.format.max), x, quantizer)
    return (jnp.abs(x) <= end).astype(jnp.float32)


def expand(scale: Array, x: Array, quantizer: Quantizer) -> Array:
    """A leaf of the scale's shape, repeated to the shape of `x`."""
    return BlockView.of(x.shape, quantizer.spec).spread(scale)
