"""The twins: for every supported Flax layer one to train (Q...) and one to serve (Packed...)."""

import abc
import dataclasses
from collections.abc import Callable
from typing import Any, ClassVar, Final

import jax.numpy as jnp
from flax import nnx
from jax import lax
from jaxtyping import Array

from lowbit_jax.nn.base import PackedTwin, StandIn, TrainTwin, Twin
from lowbit_jax.nn.packed_product import activation_format, operations, promoted
from lowbit_jax.nn.views import (
    MatrixView,
    conv_view,
    einsum_letters,
    einsum_view,
    embed_view,
    input_positions,
    linear_general_view,
    linear_view,
)
from lowbit_jax.ops.fp4_training import block_hadamard, fp4_backward_product
from lowbit_jax.ops.integer import DotGeneral, EinsumProduct
from lowbit_jax.ops.lookup import lookup
from lowbit_jax.ops.matmul import matmul
from lowbit_jax.scheme import LayerScheme
from lowbit_jax.spec import PerToken


class _ByAxes(Twin):
    """A layer that contracts some axes of its input, wherever they are."""

    @abc.abstractmethod
    def _k_axes(self, ndim: int) -> tuple[int, ...]:
        """The contracted axes of an input of this rank, in the order of the kernel's K."""

    def rows(self, x: Array) -> Array:
        return _merge_last(x, self._k_axes(x.ndim))

    def unrows(self, rows: Array, like: Array) -> Array:
        return _split_last(rows, self._k_axes(like.ndim), like.shape)

    def rows_scale(self, scale: Array, like: Array) -> Array:
        return jnp.expand_dims(scale[..., 0], sorted(self._k_axes(like.ndim)))


class _Linear(Twin):
    float_class: ClassVar[type[nnx.Module]] = nnx.Linear

    def __call__(self, inputs: Array, out_sharding: Any = None) -> Array:
        """Like the float layer."""
        return self.call(inputs, out_sharding=out_sharding)

    def rows(self, x: Array) -> Array:
        return block_hadamard(x, self.scheme.hadamard) if self.scheme.hadamard else x

    def unrows(self, rows: Array, like: Array) -> Array:
        return self.rows(rows)  # a rotation that is its own inverse

    def integer_operations(self, x: Array) -> dict[str, Any]:
        def dot_general(x_hat, w_hat, dimension_numbers, *, preferred_element_type=None, **_):
            op = DotGeneral(dimension_numbers, self.precision)
            return self.multiply_integers(x, x_hat, w_hat, op, preferred_element_type)

        # A LinearGeneral asks its `dot_general_cls` first.
        return {"dot_general": dot_general, "dot_general_cls": None}


class _LinearGeneral(_ByAxes, _Linear):
    float_class = nnx.LinearGeneral
    axis: tuple[int, ...]

    def _k_axes(self, ndim: int) -> tuple[int, ...]:
        # Sorted: Flax contracts the kernel's input axes with them in the order of the input.
        return tuple(sorted(axis % ndim for axis in self.axis))


class _Einsum(_ByAxes):
    float_class = nnx.Einsum
    einsum_str: str

    def __call__(self, inputs: Array, einsum_str: str | None = None, **kwargs: Any) -> Array:
        """Like `nnx.Einsum`, with the equation it was made with.

        Raises:
            ValueError: Another equation: the contraction, and with it the matrix view, is fixed.
        """
        if einsum_str not in (None, self.einsum_str):
            raise ValueError(
                f"the kernel was quantized along the contraction of {self.einsum_str!r}; it cannot "
                f"be used with {einsum_str!r}."
            )
        return self.call(inputs, **kwargs)

    def _k_axes(self, ndim: int) -> tuple[int, ...]:
        x, kernel, output = einsum_letters(self.einsum_str)
        contracted = [c for c in kernel if c in x and c not in output]
        positions = input_positions(self.einsum_str, ndim)
        return tuple(positions[c] for c in contracted)

    def integer_operations(self, x: Array) -> dict[str, Any]:
        def einsum_op(equation, x_hat, w_hat, *, preferred_element_type=None, **_):
            op = EinsumProduct(equation, self.precision)
            return self.multiply_integers(x, x_hat, w_hat, op, preferred_element_type)

        return {"einsum_op": einsum_op}


class _Conv(Twin):
    float_class = nnx.Conv
    kernel_size: tuple[int, ...]

    def __call__(self, inputs: Array, out_sharding: Any = None) -> Array:
        """Like `nnx.Conv`. A per-token input has one scale per sample, since windows overlap."""
        return self.call(inputs, out_sharding=out_sharding)

    def rows(self, x: Array) -> Array:
        batch = x.shape[: x.ndim - len(self.kernel_size) - 1]
        return x.reshape(*batch, -1)

    def unrows(self, rows: Array, like: Array) -> Array:
        return rows.reshape(like.shape)


class _Embed(Twin):
    float_class = nnx.Embed
    kernel_name: ClassVar[str] = "embedding"
    promote_dtype: Callable[..., Any]
    dtype: Any

    def attend(self, query: Array, out_sharding: Any = None) -> Array:
        """Like `nnx.Embed.attend`: the tied head, [..., features] to [..., vocabulary]."""
        return self.call(query, out_sharding, method="attend")

    def integer_operations(self, x: Array) -> dict[str, Any]:
        raise NotImplementedError(
            "Embed: no int8 product in the tied head. Use product='float' for this layer."
        )


def _merge_last(x: Array, axes: tuple[int, ...]) -> Array:
    """The given axes moved behind the others, in their order, and merged."""
    if axes == (x.ndim - 1,):
        return x
    rest = [axis for axis in range(x.ndim) if axis not in axes]
    moved = x.transpose(*rest, *axes)
    return moved.reshape(*moved.shape[: len(rest)], -1)


def _split_last(rows: Array, axes: tuple[int, ...], shape: tuple[int, ...]) -> Array:
    """The inverse of `_merge_last` for an array of this shape."""
    if axes == (len(shape) - 1,):
        return rows
    rest = [axis for axis in range(len(shape)) if axis not in axes]
    order = (*rest, *axes)
    split = rows.reshape([shape[axis] for axis in order])
    return split.transpose(sorted(range(len(order)), key=order.__getitem__))


class QLinear(_Linear, TrainTwin):
    """`nnx.Linear` that trains on its grid, rotated if the scheme says so."""

    rotates: ClassVar[bool] = True

    @property
    def view(self) -> MatrixView:
        """The kernel as it is, or rotated along its inputs."""
        return dataclasses.replace(linear_view(self), hadamard=self.scheme.hadamard)

    def call(self, x: Array, *args: Any, method: str = "__call__", **kwargs: Any) -> Array:
        """Like `Twin.call`; rotated operands are multiplied as they are."""
        if not (self.scheme.hadamard or self.gradient_stream):
            return super().call(x, *args, method=method, **kwargs)
        stream = self.gradient_stream
        key = None if stream is None else stream()
        kernel = self.view.to_matrix(self.kernel_variable[...])
        if self.scheme.weight is not None:
            kernel = self.scheme.weight.fake_quant(kernel, self.state("kernel"))

        def dot_general(x, w, dimension_numbers, *, preferred_element_type=None, **_):
            y = x @ w if key is None else fp4_backward_product(x, w, key)
            return y.astype(preferred_element_type or y.dtype)

        stand_in = StandIn(self, kernel=kernel, dot_general=dot_general)
        x_hat = self.quantized_rows("input", x)
        y = getattr(self.float_class, method)(stand_in, x_hat, *args, **kwargs)
        return self.quantize_activation("output", y)


class QLinearGeneral(_LinearGeneral, TrainTwin):
    """`nnx.LinearGeneral` that trains on its grid."""

    @property
    def view(self) -> MatrixView:
        """Input axes merged to K, output axes to N."""
        return linear_general_view(self)


class QEinsum(_Einsum, TrainTwin):
    """`nnx.Einsum` that trains on its grid."""

    def __init__(self, layer: nnx.Einsum, scheme: LayerScheme):
        """Takes the place of an einsum; see `TrainTwin`.

        Raises:
            NotImplementedError: An int8 product of an equation that sums one operand alone.
        """
        super().__init__(layer, scheme)
        x, kernel, output = einsum_letters(self.einsum_str)
        alone = sorted((set(x) ^ set(kernel)) - set(output))
        if scheme.product == "int8" and alone:
            raise NotImplementedError(
                f"int8 product: {self.einsum_str!r} sums over {alone}, which one operand has "
                "alone: its scales differ along that sum. Use product='float'."
            )

    @property
    def view(self) -> MatrixView:
        """By the letters of the equation."""
        return einsum_view(self)


class QConv(_Conv, TrainTwin):
    """`nnx.Conv` that trains on its grid."""

    def __init__(self, layer: nnx.Conv, scheme: LayerScheme):
        """Takes the place of a convolution; see `TrainTwin`.

        Raises:
            NotImplementedError: Grouped scales of the input or an int8 product.
        """
        granularity = scheme.input.spec.granularity if scheme.input is not None else None
        if isinstance(granularity, PerToken) and granularity.k is not None:
            raise NotImplementedError(
                f"Conv: inputs {granularity.describe()}: windows overlap, so groups along K have "
                "no meaning for the input. Use PerToken() or PerTensor()."
            )
        if scheme.product != "float":
            self.integer_operations(jnp.zeros(()))
        super().__init__(layer, scheme)

    @property
    def view(self) -> MatrixView:
        """Window and channels merged to K, groups a stack."""
        return conv_view(self)


class QEmbed(_Embed, TrainTwin):
    """`nnx.Embed` that trains on its grid."""

    def __call__(self, inputs: Array, out_sharding: Any = None) -> Array:
        """Like `nnx.Embed`; the scheme's quantizer of inputs is the tied head's, not used here."""
        stand_in: Any = StandIn(self, embedding=self.quantized_kernel())
        return nnx.Embed.__call__(stand_in, inputs, out_sharding)

    @property
    def view(self) -> MatrixView:
        """Features as K, the vocabulary as N."""
        return embed_view(self)


class PackedLinear(_Linear, PackedTwin):
    """`nnx.Linear` with a packed kernel."""

    def packed_operations(self) -> dict[str, Any] | None:
        """Through `ops.matmul`, unless the layer has a product of its own."""
        return _packed_linear(self, self.matrix.shape[-1:])


class PackedLinearGeneral(_LinearGeneral, PackedTwin):
    """`nnx.LinearGeneral` with a packed kernel."""

    out_features: tuple[int, ...]

    def packed_operations(self) -> dict[str, Any] | None:
        """Through `ops.matmul`, unless the layer has batch axes or a product of its own."""
        return _packed_linear(self, tuple(self.out_features))


class PackedEinsum(_Einsum, PackedTwin):
    """`nnx.Einsum` with a packed kernel."""


def _packed_linear(layer: Any, features: tuple[int, ...]) -> dict[str, Any] | None:
    own = getattr(layer, "dot_general", None) not in (None, lax.dot_general)
    if own or getattr(layer, "dot_general_cls", None) is not None or layer.view.stack_axes:
        return None

    def multiply(x, q, *, preferred_element_type=None):
        return layer.multiply_packed(x, q, features, preferred_element_type)

    return operations(layer.promote_dtype, multiply)


class PackedConv(_Conv, PackedTwin):
    """`nnx.Conv` with a packed kernel."""


class PackedEmbed(_Embed, PackedTwin):
    """`nnx.Embed` with a packed table; a lookup dequantizes the looked-up entries only."""

    def __call__(self, inputs: Array, out_sharding: Any = None) -> Array:
        """Like `nnx.Embed`: tokens [...] to [..., features]."""
        if out_sharding is not None:
            raise NotImplementedError("PackedEmbed: out_sharding; constrain the result instead.")
        entries = lookup(inputs, self.matrix)
        (entries,) = self.promote_dtype((entries,), dtype=self.dtype, inexact=False)
        return entries

    @property
    def multiplies_packed(self) -> bool:
        """Whether `ops.matmul` computes the tied head."""
        return self.matrix.ndim == 2

    def attend(self, query: Array, out_sharding: Any = None) -> Array:
        """Like `nnx.Embed.attend`: the tied head, through `ops.matmul`."""
        if self.matrix.ndim != 2 or out_sharding is not None:
            return super().attend(query, out_sharding)
        act = activation_format(self.scheme)
        if act is None:
            query = self.quantize_activation("input", query)
        query, matrix = promoted(self.promote_dtype, (query, self.matrix), dtype=self.dtype)
        return self.quantize_activation("output", matmul(query, matrix, act=act))


TRAIN_TWINS: Final[dict[type[nnx.Module], type[TrainTwin]]] = {
    nnx.Linear: QLinear,
    nnx.LinearGeneral: QLinearGeneral,
    nnx.Einsum: QEinsum,
    nnx.Conv: QConv,
    nnx.Embed: QEmbed,
}
PACKED_TWINS: Final[dict[type[TrainTwin], type[PackedTwin]]] = {
    QLinear: PackedLinear,
    QLinearGeneral: PackedLinearGeneral,
    QEinsum: PackedEinsum,
    QConv: PackedConv,
    QEmbed: PackedEmbed,
}


def to_float(twin: Twin) -> nnx.Module:
    """The plain Flax layer with a twin's quantized kernel; activations are float again."""
    rngs = nnx.Rngs(0)
    blanks: dict[type[nnx.Module], Callable[[], nnx.Module]] = {
        nnx.Linear: lambda: nnx.Linear(1, 1, rngs=rngs),
        nnx.LinearGeneral: lambda: nnx.LinearGeneral(1, 1, rngs=rngs),
        nnx.Einsum: lambda: nnx.Einsum("a,ab->b", (1, 1), rngs=rngs),
        nnx.Conv: lambda: nnx.Conv(1, 1, (1,), rngs=rngs),
        nnx.Embed: lambda: nnx.Embed(1, 1, rngs=rngs),
    }
    layer = blanks[twin.float_class]()
    for name in vars(layer):
        if not name.startswith("_pytree__"):
            setattr(layer, name, getattr(twin, name))
    kernel, variable = twin.quantized_kernel(), twin.kernel_variable
    trained = isinstance(twin, TrainTwin)  # whose variable has the sharding metadata to keep
    setattr(layer, twin.kernel_name, variable.replace(kernel) if trained else nnx.Param(kernel))
    return layer
