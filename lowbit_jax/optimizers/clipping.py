"""Clipping of latent weights, which BinaryConnect and BNN do after each update."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx

from lowbit_jax.optimizers.kernels import path_name
from lowbit_jax.quantizers import Quantizer, Sign
from lowbit_jax.surgery import quantized_layers


def clip_latent(
    model: nnx.Module, bound: float = 1.0, quantizers: tuple[type[Quantizer], ...] = (Sign,)
) -> optax.GradientTransformation:
    """w' = clip(w + update, -bound, bound) for the latent weights of binary layers.

    BinaryConnect (arXiv:1511.00363, section 2.4) with bound 1: latent weights beyond it would grow
    without any effect on their signs. The last transformation of a chain:
    `optax.chain(optax.adam(1e-3), clip_latent(model))`. Weights that start beyond the bound are
    brought to it by the first update.

    Args:
        model: Quantized, as it trains.
        bound: Positive.
        quantizers: Layers with a kernel quantizer of these types are clipped.

    Raises:
        ValueError: A bound that is not positive, or no layer of these types.
    """
    if not bound > 0:
        raise ValueError(f"clip_latent: bound={bound} must be positive.")
    names = {
        f"{path}/{twin.kernel_name}" if path else twin.kernel_name
        for path, twin in quantized_layers(model)
        if isinstance(twin.scheme.weight, quantizers)
    }
    if not names:
        kinds = [q.__name__ for q in quantizers]
        raise ValueError(
            f"clip_latent: no layer's kernel is quantized by {kinds}. Pass the model that "
            'lb.quantize_model(model, "w1a16_bc") returned.'
        )
    most = np.float32(bound)

    def update(updates: Any, params: Any = None) -> Any:
        if params is None:
            raise ValueError("clip_latent: update needs the parameters.")

        def clipped(path: Any, update: jax.Array, leaf: jax.Array) -> jax.Array:
            if path_name(path) not in names:
                return update
            return jnp.clip(leaf + update, -most, most).astype(leaf.dtype) - leaf

        return jax.tree_util.tree_map_with_path(clipped, updates, params)

    return optax.stateless(update)
