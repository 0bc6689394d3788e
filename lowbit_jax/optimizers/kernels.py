"""Which leaves of a parameter tree are kernels to be quantized, and how each is a matrix.

An optimizer sees arrays by their paths only. Which array is a kernel, how it is seen as a matrix
and which quantizer is its own is looked up once, in the model.
"""

import dataclasses
from typing import Any

import jax
from flax import nnx
from jaxtyping import Array

from lowbit_jax.nn import TrainTwin
from lowbit_jax.nn.views import MatrixView
from lowbit_jax.quantizers import Quantizer
from lowbit_jax.quantizers.reshaped import Reshaped
from lowbit_jax.recipe import Recipe
from lowbit_jax.surgery import quantize_model, quantized_layers


@dataclasses.dataclass(frozen=True)
class Kernel:
    """How one leaf is quantized.

    Attributes:
        view: How the leaf is seen as a matrix [..., K, N].
        quantizer: Of that matrix; without a state.
    """

    view: MatrixView
    quantizer: Quantizer

    def hard(self, leaf: Array) -> Array:
        """The leaf on its grid, as `quantize_model` and `pack_model` would have it."""
        matrix = self.view.to_matrix(leaf)
        return self.view.from_matrix(self.quantizer.freeze(matrix, {}).dequantize())


def path_name(path: tuple[Any, ...]) -> str:
    """`layers/0/mlp/up/kernel` from a key path through an nnx.State."""
    keys = [key for key in path if not isinstance(key, jax.tree_util.GetAttrKey)]
    return jax.tree_util.keystr(tuple(keys), simple=True, separator="/")


def kernels_of(model: nnx.Module, recipe: Recipe | str, who: str) -> dict[str, Kernel]:
    """The kernels of a float model that a recipe quantizes, by the path of the leaf.

    Args:
        model: Float; it is left untouched.
        recipe: As of `quantize_model`. Weights only: an optimizer sees no activations.
        who: The caller, for messages.

    Raises:
        ValueError: From `quantize_model`, as it is.
        NotImplementedError: A scheme with quantized activations, a quantizer with a state or one
            that rounds a function of the array.
    """
    found = {}
    for path, twin in quantized_layers(quantize_model(model, recipe)):
        quantizer = twin.scheme.weight
        if quantizer is None or twin.scheme.input is not None or twin.scheme.output is not None:
            raise NotImplementedError(
                f"{who}: {path}: the scheme is {twin.scheme.describe()}. An optimizer quantizes "
                "weights and nothing else; use a preset of weights, such as w4a16, or "
                "lb.quantize_model for the activations' part of it."
            )
        assert isinstance(twin, TrainTwin)
        if twin.state("kernel") or _reshapes(quantizer):
            raise NotImplementedError(
                f"{who}: {path}: {type(quantizer).__name__} "
                f"{'has a state' if twin.state('kernel') else 'rounds a function of the array'}; "
                "here the levels are a function of the weights. Use Absmax, MinMax, AbsMean, Sign "
                "or XNOR."
            )
        name = f"{path}/{twin.kernel_name}" if path else twin.kernel_name
        found[name] = Kernel(twin.view, quantizer)
    return found


def _reshapes(quantizer: Quantizer) -> bool:
    return isinstance(quantizer, Reshaped) and type(quantizer).reshaped is not Reshaped.reshaped


def check_found(params: Any, kernels: dict[str, Kernel], who: str) -> None:
    """Raises ValueError if a kernel is not among these parameters."""
    leaves = jax.tree_util.tree_flatten_with_path(params)[0]
    names = {path_name(path) for path, _ in leaves}
    if missing := sorted(set(kernels) - names):
        raise ValueError(
            f"{who}: {len(missing)} kernels of the recipe are not among the parameters, the first "
            f"being {missing[0]}; those are {sorted(names)[:5]} .. Pass the state of nnx.Param of "
            "the model that the transformation was made for."
        )
