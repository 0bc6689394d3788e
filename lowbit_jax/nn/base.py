"""What every quantized twin of a Flax layer shares.

A twin takes over the attributes of the layer it replaces, its variables included, and computes
exactly what that layer would: it calls the layer's own class on a stand-in whose kernel is the
quantized one. Padding, dtypes, precision, sharding and whatever Flax adds later stay Flax's.
"""

import abc
import functools
import types
from typing import Any, ClassVar, Final, override

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array

from lowbit_jax.grid import Range, effective_scale
from lowbit_jax.nn import packed_product
from lowbit_jax.nn.variables import Packed, QuantStat
from lowbit_jax.nn.views import MatrixView
from lowbit_jax.ops import Prepared
from lowbit_jax.ops.integer import Contraction, check_integer, integer_levels, integer_product
from lowbit_jax.qtensor import QTensor
from lowbit_jax.quantizers import Quantizer, State
from lowbit_jax.quantizers.reshaped import Reshaped
from lowbit_jax.scheme import LayerScheme


class StandIn:
    """A twin seen as the float layer that it stands for, with some attributes replaced."""

    def __init__(self, layer: "Twin", **replaced: Any):
        self._layer = layer
        self.__dict__.update(replaced)

    def __getattr__(self, name: str) -> Any:
        if hasattr(self._layer, name):
            return getattr(self._layer, name)
        return getattr(self._layer.float_class, name).__get__(self)


class Twin(nnx.Module, abc.ABC):
    """A layer that quantizes its input, its kernel and its output as its scheme says.

    Attributes:
        scheme: How this layer is quantized.
        calibrating: While True, calls update the statistics of the activations (`QuantStat`).
    """

    float_class: ClassVar[type[nnx.Module]]
    """The Flax layer that it stands for."""
    kernel_name: ClassVar[str] = "kernel"
    """The layer's own name of its kernel, which is kept."""

    scheme: LayerScheme
    calibrating: bool

    @property
    @abc.abstractmethod
    def view(self) -> MatrixView:
        """How the kernel is seen as a matrix."""

    @abc.abstractmethod
    def quantized_kernel(self) -> Array:
        """The kernel on its grid, float, in the layer's own layout."""

    @abc.abstractmethod
    def integer_kernel(self) -> tuple[Array, Range]:
        """The integers of the kernel's matrix view, and their range."""

    @abc.abstractmethod
    def freeze_kernel(self) -> QTensor:
        """The kernel's matrix view as it is, or will be, packed."""

    @property
    def kernel_variable(self) -> nnx.Variable[Any]:
        """The variable that holds the kernel, whatever its name."""
        return getattr(self, self.kernel_name)

    def rows(self, x: Array) -> Array:
        """Activations with their contraction as the last axis, merged: what `PerToken` reduces."""
        return x

    def unrows(self, rows: Array, like: Array) -> Array:
        """The inverse of `rows`."""
        return rows

    def rows_scale(self, scale: Array, like: Array) -> Array:
        """A scale [.., 1] of `rows(like)` in the layout of `like`, 1 along contracted axes."""
        return scale

    def state(self, part: str) -> dict[str, Array]:
        """The arrays of a quantizer's state: part is "kernel", "input" or "output"."""
        prefix = f"{part}_"
        return {
            name.removeprefix(prefix): value[...]
            for name, value in vars(self).items()
            if name.startswith(prefix)
            and isinstance(value, nnx.Variable)
            and not isinstance(value, Packed)  # `input_permutation` is no quantizer's
        }

    def quantize_activation(self, part: str, x: Array) -> Array:
        """Activations on the grid of their part ("input" or "output"), if the scheme has one."""
        if getattr(self.scheme, part) is None:
            return x
        rows = self.quantized_rows(part, x)
        return self.unrows(rows, x) if part == "input" else rows

    def quantized_rows(self, part: str, x: Array) -> Array:
        """Like `quantize_activation`, in the layout of `rows`."""
        rows = self.rows(x) if part == "input" else x
        quantizer: Quantizer | None = getattr(self.scheme, part)
        if quantizer is None:
            return rows
        state = self.state(part)
        if self.calibrating and state:
            state = quantizer.observe(rows, state)
            for name, value in state.items():
                getattr(self, f"{part}_{name}")[...] = value
        return quantizer.fake_quant(rows, state)

    def call(self, x: Array, *args: Any, method: str = "__call__", **kwargs: Any) -> Array:
        """The float layer's own method, with quantized operands."""
        x_hat = self.quantize_activation("input", x)
        replaced: dict[str, Any] = {self.kernel_name: self.quantized_kernel()}
        if self.scheme.product == "int8":
            replaced |= self.integer_operations(x)
        y = getattr(self.float_class, method)(StandIn(self, **replaced), x_hat, *args, **kwargs)
        return self.quantize_activation("output", y)

    def integer_operations(self, x: Array) -> dict[str, Any]:
        """The attributes through which the float layer multiplies, replaced by integer products."""
        raise NotImplementedError(
            f"{type(self).__name__}: no int8 product here; XLA's integer convolution on the CPU "
            "takes 50 times as long as float. Use product='float' for this layer."
        )

    def multiply_integers(
        self, x: Array, x_hat: Array, w_hat: Array, op: Contraction, dtype: Any = None
    ) -> Array:
        """`op(x_hat, w_hat)` from integers, as `dtype` (default: that of `x_hat`).

        `x` is the input before it was quantized.
        """
        quantizer = self.scheme.input
        assert quantizer is not None
        assert self.scheme.weight is not None
        rows = self.rows(x)
        x_range = quantizer.range(rows, self.state("input"))
        x_levels = self.unrows(integer_levels(rows, quantizer.spec, x_range), x)
        x_scale = self.rows_scale(effective_scale(x_range), x)
        matrix, w_range = self.integer_kernel()
        w_scale = self.view.expand_scale(effective_scale(w_range), w_hat.ndim)
        w_levels = self.view.from_matrix(matrix)
        dtype = jnp.dtype(dtype or x_hat.dtype)
        return integer_product(x_hat, w_hat, x_levels, x_scale, w_levels, w_scale, op, dtype)


_STATIC: Final = (bool, int, float, str, type, types.FunctionType, jnp.dtype)


def adopt(twin: Twin, layer: nnx.Module) -> None:
    """Gives a twin every attribute of the layer it replaces, the same variables included."""
    for name, value in vars(layer).items():
        if name.startswith("_pytree__"):
            continue
        if value is None or isinstance(value, _STATIC):
            # Flax's check of every assignment is most of what a twin costs; it checks all once more
            # when __init__ is done, and takes what stands there by then for static.
            vars(twin)[name] = value
        else:
            # Flax takes an array (a convolution's mask) for data by itself, but not a traced one.
            setattr(twin, name, nnx.data(value) if isinstance(value, jax.Array) else value)


def _gradient_stream(kernel: Array) -> nnx.RngStream:
    """A stream of keys; kernels that start from other numbers have other ones.

    Raises:
        NotImplementedError: A stack of kernels, which a scan would cut along the keys.
    """
    if kernel.ndim != 2:
        raise NotImplementedError(
            f"FP4 backward products of a stack of kernels {kernel.shape}: its layers would need a "
            "random stream each. Use a model with stacked=False."
        )
    bits = jax.lax.bitcast_convert_type(kernel.reshape(-1)[0].astype(jnp.float32), jnp.uint32)
    return nnx.RngStream(jax.random.fold_in(jax.random.key(0), bits), tag="gradients")


class TrainTwin(Twin):
    """A twin that trains: the kernel stays a float nnx.Param and is quantized in every call.

    Attributes:
        gradient_stream: Keys of an FP4 backward pass; None without one.
    """

    rotates: ClassVar[bool] = False
    """Whether it knows the scheme's `hadamard` and `backward`."""
    gradient_stream: nnx.RngStream | None

    def __init__(self, layer: nnx.Module, scheme: LayerScheme):
        """Takes the place of a float layer; its variables are shared, not copied.

        Raises:
            ValueError: The kernel does not split into the scheme's groups.
            NotImplementedError: The scheme asks for a product that its formats do not allow.
        """
        adopt(self, layer)
        self.scheme = scheme
        self.calibrating = False
        check_scheme(scheme)
        if (scheme.hadamard or scheme.backward != "float") and not self.rotates:
            raise NotImplementedError(
                f"{type(self).__name__}: Hadamard rotations and FP4 backward products are those of "
                f"Linear layers; this scheme has hadamard={scheme.hadamard}, backward="
                f"{scheme.backward!r}."
            )
        self.gradient_stream = nnx.data(None)
        if scheme.backward != "float":
            self.gradient_stream = _gradient_stream(self.kernel_variable[...])
        matrix = self.view.to_matrix(self.kernel_variable[...])
        if scheme.weight is not None:
            scheme.weight.spec.scale_shape(matrix.shape)
            self._add_state("kernel", scheme.weight, matrix)
        stack = matrix.shape[: self.view.lead(self.kernel_variable[...].ndim)]
        for part, length in (("input", matrix.shape[-2]), ("output", matrix.shape[-1])):
            quantizer = getattr(scheme, part)
            if quantizer is not None:
                row = jnp.zeros((*stack, 1, length), jnp.float32)
                quantizer.spec.scale_shape(row.shape)
                self._add_state(part, quantizer, row)

    def _add_state(self, part: str, quantizer: Quantizer, x: Array) -> None:
        for name, value in quantizer.init(x).items():
            kind = nnx.Param if name in quantizer.trainable else QuantStat
            setattr(self, f"{part}_{name}", kind(value))

    @override
    def quantized_kernel(self) -> Array:
        kernel = self.kernel_variable[...]
        if self.scheme.weight is None:
            return kernel
        matrix = self.view.to_matrix(kernel)
        return self.view.from_matrix(self.scheme.weight.fake_quant(matrix, self.state("kernel")))

    @override
    def integer_kernel(self) -> tuple[Array, Range]:
        assert self.scheme.weight is not None
        matrix = self.view.to_matrix(self.kernel_variable[...])
        range_ = self.scheme.weight.range(matrix, self.state("kernel"))
        return integer_levels(matrix, self.scheme.weight.spec, range_), range_

    @override
    def freeze_kernel(self) -> QTensor:
        if self.scheme.weight is None:
            raise ValueError("this layer's scheme quantizes activations only: its kernel is float.")
        matrix = self.view.to_matrix(self.kernel_variable[...])
        return _frozen(self.scheme.weight, matrix, self.state("kernel"))


@functools.partial(jax.jit, static_argnames="quantizer", inline=True)
def _frozen(quantizer: Quantizer, matrix: Array, state: State) -> QTensor:
    """As one program: outside jit, every operation would be compiled for every shape."""
    return quantizer.freeze(matrix, state)


class PackedTwin(Twin):
    """A twin that serves: the kernel is a QTensor in an `lb.Packed`, and no float kernel exists.

    Attributes:
        input_permutation: int32 [K] in an `lb.Packed`, or None: row r of the QTensor is row
            `input_permutation[r]` of the kernel. GPTQ's activation order stores rows sorted by
            group.
        kernel_global_divisor: float32 [1, 1] in an `lb.Packed`, or None: where the file that the
            kernel came from keeps the reciprocal of its global scale, that number itself, since 1 /
            (1 / x) is not always x.
    """

    input_permutation: Packed | None
    kernel_global_divisor: Packed | None

    def __init__(self, layer: TrainTwin):
        """Packs a trained twin; the layer itself is left as it was."""
        adopt(self, layer)
        del self.gradient_stream  # type: ignore[attr-defined]  # adopted
        for name in [n for n, v in vars(self).items() if isinstance(v, nnx.Variable)]:
            if name.startswith("kernel_"):
                delattr(self, name)  # stored ranges live on in the QTensor
        self.packed_view = layer.view
        setattr(self, self.kernel_name, Packed(layer.freeze_kernel()))
        self.input_permutation = nnx.data(None)
        self.kernel_global_divisor = nnx.data(None)

    @property
    @override
    def view(self) -> MatrixView:
        return self.packed_view

    def packed_operations(self) -> dict[str, Any] | None:
        """Attributes through which the float layer multiplies by the packed matrix itself.

        None: the kernel is dequantized for it (convolutions, stacks, products of the user's own).
        """
        return None

    @property
    def multiplies_packed(self) -> bool:
        """Whether `ops.matmul` computes this layer."""
        return self.matrix.ndim == 2 and self.packed_operations() is not None

    def multiply_packed(self, x: Array, q: Any, features: tuple[int, ...], dtype: Any) -> Array:
        """x by the packed matrix, as [batch.., features..]."""
        order = self.input_permutation
        return packed_product.product(
            x,
            q,
            rows=self.rows,
            features=features,
            act=packed_product.activation_format(self.scheme),
            permutation=None if order is None else order.get_value(),
            preferred_element_type=dtype,
        )

    @override
    def call(self, x: Array, *args: Any, method: str = "__call__", **kwargs: Any) -> Array:
        operations = self.packed_operations()
        placed = kwargs.get("out_sharding") is not None or any(a is not None for a in args)
        if operations is None or self.matrix.ndim != 2 or placed:
            return super().call(x, *args, method=method, **kwargs)
        if packed_product.activation_format(self.scheme) is None:
            x = self.quantize_activation("input", x)
        stand_in = StandIn(self, **{self.kernel_name: self.matrix}, **operations)
        y = getattr(self.float_class, method)(stand_in, x, *args, **kwargs)
        return self.quantize_activation("output", y)

    @property
    def matrix(self) -> QTensor | Prepared:
        """The packed matrix, as it is stored or as a backend wants it."""
        return self.kernel_variable.get_value()

    @override
    def quantized_kernel(self) -> Array:
        return self.view.from_matrix(self._in_order(self.matrix.dequantize()))

    @override
    def integer_kernel(self) -> tuple[Array, Range]:
        q = self.freeze_kernel()
        levels = q.spec.format.decode(q.codes()).astype(jnp.int8)
        return self._in_order(levels), q.range()

    def _in_order(self, matrix: Array) -> Array:
        """Rows of the stored matrix in the kernel's own order."""
        if self.input_permutation is None:
            return matrix
        inverse = jnp.argsort(self.input_permutation.get_value())
        return jnp.take(matrix, inverse, axis=-2, unique_indices=True)

    @override
    def freeze_kernel(self) -> QTensor:
        if isinstance(self.matrix, Prepared):
            raise ValueError(
                f"this kernel was prepared for {self.matrix.meta.target!r}; what is prepared is "
                "for multiplying only. Use the model that lb.prepare_model was given."
            )
        return self.matrix


def check_scheme(scheme: LayerScheme) -> None:
    """Raises NotImplementedError if the scheme's product does not fit its formats."""
    if scheme.product == "int8":
        if scheme.hadamard or scheme.backward != "float":
            raise NotImplementedError(
                "int8 product: no rotation and no FP4 backward pass. Use product='float'."
            )
        if scheme.weight is None or scheme.input is None:
            raise NotImplementedError(
                "int8 product: needs a quantized kernel and quantized inputs."
            )
        for what, quantizer in (("kernels", scheme.weight), ("inputs", scheme.input)):
            if isinstance(quantizer, Reshaped):
                raise NotImplementedError(
                    f"int8 product: {what} of {type(quantizer).__name__} round a function of the "
                    "array, not the array. Use product='float'."
                )
        check_integer(scheme.weight.spec, "kernels")
        check_integer(scheme.input.spec, "inputs")
