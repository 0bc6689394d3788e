"""OneBit: a sign matrix between two value vectors (arXiv:2402.11295).

Eq. 3 of the paper, without the LayerNorm that it puts behind (a model has its own):

    y = ((x * g) sign(W)) * h,        g [K], h [N].

h is the scale per channel of a binary kernel, learned by the quantizer `OneBit`; g is a parameter
of the wrapper `ValueInput`. Both start from the decomposition of `calibrate.sign_value`, so that
the first step already computes W's best such form. Packing keeps 1 bit a weight, h as the packed
scales and g beside it; the paper trains with a float teacher (`distill`).

    model = one_bit_model(model)          # trains
    model = lb.pack_model(model)          # 1 bit a weight
"""

from typing import Any

import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array

from lowbit_jax.calibrate import sign_value
from lowbit_jax.nn import QLinear, QLinearGeneral, TrainTwin
from lowbit_jax.quantizers import OneBit
from lowbit_jax.recipe import Recipe
from lowbit_jax.spec import PerChannel
from lowbit_jax.surgery import quantize_model
from lowbit_jax.walk import layers, rebuilt


class ValueInput(nnx.Module):
    """A layer behind a learned factor for each of its inputs: `linear(x * value)`.

    It stands at the layer's own path, and the layer at `PATH/linear`.

    Attributes:
        linear: A linear layer: its twin in training, packed, or dequantized.
        value: float32 [K], the paper's g.
    """

    def __init__(self, linear: nnx.Module, value: Array):
        self.linear = linear
        self.value = nnx.Param(value)

    def __call__(self, x: Array, *args: Any, **kwargs: Any) -> Array:
        """Like the layer's own call."""
        linear: Any = self.linear
        contracted = {axis % x.ndim for axis in getattr(linear, "axis", (-1,))}
        shape = [n if axis in contracted else 1 for axis, n in enumerate(x.shape)]
        return linear(x * self.value[...].astype(x.dtype).reshape(shape), *args, **kwargs)


def one_bit_model(model: nnx.Module, recipe: Recipe | str = "w1a16_onebit") -> nnx.Module:
    """A new model whose layers of the quantizer `OneBit` have both value vectors, and train.

    Args:
        model: Float; it is left untouched.
        recipe: As of `quantize_model`; layers of other quantizers are quantized as it says.

    Raises:
        ValueError: No layer is to be a OneBit layer; or from `quantize_model`, as it is.
        NotImplementedError: A OneBit layer that is no `Linear` or `LinearGeneral`, that is a stack,
            or whose scales are not per channel.
    """
    quantized = quantize_model(model, recipe)
    chosen = [path for path, module in layers(quantized) if _is_one_bit(module)]
    if not chosen:
        raise ValueError(
            "one_bit_model: the recipe gives no layer the quantizer OneBit. Use the preset "
            "w1a16_onebit in it."
        )

    def replace(path: str, module: Any) -> Any:
        if path not in chosen:
            return module
        matrix = module.view.to_matrix(module.kernel_variable[...])
        channels = module.scheme.weight.spec.granularity == PerChannel()
        if not isinstance(module, QLinear | QLinearGeneral) or matrix.ndim != 2 or not channels:
            raise NotImplementedError(
                f"one_bit_model: {path}: a {type(module).__name__} of shape {matrix.shape} "
                f"{module.scheme.weight.spec.granularity.describe()}; value vectors are those of "
                "Linear and LinearGeneral with a matrix [K, N] and a scale per channel."
            )
        inputs, outputs = sign_value(matrix)
        layer: Any = module
        layer.kernel_scale[...] = jnp.expand_dims(outputs, 0)
        return ValueInput(module, inputs)

    return rebuilt(quantized, replace)


def _is_one_bit(module: Any) -> bool:
    return isinstance(module, TrainTwin) and isinstance(module.scheme.weight, OneBit)
