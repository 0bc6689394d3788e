"""Layers outside the blocks: embedding and head, where a recipe ranges over them too."""

from typing import Any

import jax.numpy as jnp
from flax import nnx

from lowbit_jax.ptq.layers import get_matrix
from lowbit_jax.ptq.ranges import find_range, snapped
from lowbit_jax.ptq.stage import LayerSolution, solved_twin
from lowbit_jax.quantizers import StaticAbsmax
from lowbit_jax.scheme import LayerScheme
from lowbit_jax.walk import rebuilt


def quantize_outside(model: nnx.Module, schemes: dict[str, LayerScheme]) -> nnx.Module:
    """The model with these layers rounded to nearest, in the ranges of least error.

    Args:
        model: Float where these layers are; left untouched.
        schemes: By path in the model; nothing changes if empty.

    Raises:
        NotImplementedError: Activations with calibrated ranges, or without quantized weights.
    """

    def replace(path: str, layer: Any) -> Any:
        scheme = schemes.get(path)
        if scheme is None:
            return layer
        if scheme.weight is None or any(
            isinstance(part, StaticAbsmax) for part in (scheme.input, scheme.output)
        ):
            raise NotImplementedError(
                f"{path}: layers outside the blocks have quantized weights and ranges of "
                "activations that follow each call; it is asked for "
                f"{scheme.describe()}. Leave it out, or use a per-token scheme for it."
            )
        matrix = get_matrix(layer).astype(jnp.float32)
        range_ = find_range(matrix, scheme.weight.spec, "mse")
        solution = LayerSolution(snapped(matrix, scheme.weight.spec, range_), range_)
        return solved_twin(layer, scheme, solution)

    return rebuilt(model, replace) if schemes else model
