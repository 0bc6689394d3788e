"""A few layers' weights, in units of their scale, for the picture of a run."""

from typing import Any

import jax.numpy as jnp
import numpy as np
from flax import nnx

from lowbit_jax.blocks import BlockView
from lowbit_jax.formats import Learned
from lowbit_jax.grid import effective_scale
from lowbit_jax.qtensor import QTensor
from lowbit_jax.reporting.plots import WeightSample
from lowbit_jax.training.monitor import layers_with_codes

_MOST_WEIGHTS = 200_000


def weight_samples(model: nnx.Module, count: int = 6) -> list[WeightSample]:
    """Up to `count` layers, evenly over the depth; of a float model, its kernels."""
    if quantized := layers_with_codes(model):
        return [_on_grid(path, layer) for path, layer in _spread(quantized, count)]
    kernels = [
        ("/".join(map(str, path[:-1])), leaf[...])
        for path, leaf in nnx.to_flat_state(nnx.state(model, nnx.Param))
        if path[-1] == "kernel"
    ]
    return [
        WeightSample(path, _thin(np.asarray(kernel, np.float32)), np.zeros(0))
        for path, kernel in _spread(kernels, count)
    ]


def _on_grid(path: str, layer: Any) -> WeightSample:
    q = layer.freeze_kernel()
    view = BlockView.of(q.shape, q.spec)
    kernel = layer.view.to_matrix(layer.kernel_variable[...])
    scale = view.split_scale(effective_scale(q.range()))
    split = view.split(kernel.astype(jnp.float32))
    # A scale of 0 stands for a block of zeros.
    levels = jnp.where(scale != 0, split / jnp.where(scale != 0, scale, 1.0), 0.0)
    return WeightSample(path, _thin(np.asarray(levels)), _grid(q))


def _grid(q: QTensor) -> np.ndarray:
    """The values of the format, ascending; of a learned one their means over the blocks."""
    fmt = q.spec.format
    if isinstance(fmt, Learned):
        range_ = q.range()
        assert range_.basis is not None
        return np.unique([float(jnp.mean(value)) for value in fmt.values(range_.basis)])
    codes = jnp.arange(2**q.spec.bits, dtype=jnp.uint8)
    return np.unique(fmt.round(fmt.decode(codes)))


def _spread[T](items: list[T], count: int) -> list[T]:
    picks = np.unique(np.linspace(0, len(items) - 1, min(count, len(items))).round().astype(int))
    return [items[i] for i in picks]


def _thin(weights: np.ndarray) -> np.ndarray:
    flat = weights.reshape(-1)
    return flat[:: -(-flat.size // _MOST_WEIGHTS)]
