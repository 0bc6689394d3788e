"""What quantization does to the weights while they train: flips, saturation, scales.

- flips: share of codes that changed since the last look. Falls as a low-bit model settles; near 0
  from the start means that the latent weights do not move, a constant high value that they
  oscillate (learning rate too high).
- saturation: share of codes at either end of the grid; for binary always 1.
- scale: mean over the layer's scales, global scale included.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, UInt8

import lowbit_jax as lb
from lowbit_jax.blocks import BlockView
from lowbit_jax.formats import Learned
from lowbit_jax.grid import decoded, effective_scale, value_table
from lowbit_jax.qtensor import QTensor
from lowbit_jax.training.step import TrainState

Codes = dict[str, UInt8[Array, "..."]]
NAMES = ("flips", "saturation", "scale")


def make_monitor(graphdef: Any) -> Callable[[TrainState, Codes], tuple[Codes, Any]]:
    """`monitor(state, previous) -> (codes, numbers)`, compiled.

    `numbers` is float32 [layers, 3], in the order of `codes`.
    """

    @jax.jit
    def monitor(state: TrainState, previous: Codes) -> tuple[Codes, Any]:
        codes, rows = {}, []
        for path, q in _frozen(graphdef, state):
            codes[path] = q.codes()
            values, low, high = levels_and_ends(q)
            rows.append(
                jnp.stack(
                    [
                        jnp.mean(codes[path] != previous[path], dtype=jnp.float32),
                        jnp.mean((values == low) | (values == high), dtype=jnp.float32),
                        jnp.mean(effective_scale(q.range())),
                    ]
                )
            )
        return codes, jnp.stack(rows) if rows else jnp.zeros((0, len(NAMES)))

    return monitor


def levels_and_ends(q: QTensor) -> tuple[Array, Array, Array]:
    """Every element in units of its scale, and the ends of its grid, in the split shape."""
    view, range_ = BlockView.of(q.shape, q.spec), q.range()
    values = decoded(view.split(q.codes()), q.spec, range_, view)
    if isinstance(q.spec.format, Learned):
        table = jnp.stack(value_table(q.spec.format, range_, view))
        return values, table.min(0), table.max(0)
    low, high = q.spec.format.round(jnp.array([-jnp.inf, jnp.inf], jnp.float32))
    return values, low, high


def initial_codes(monitor: Any, graphdef: Any, state: TrainState) -> Codes:
    """The codes before the first step, by the same compiled function."""
    shapes = jax.eval_shape(lambda s: {path: q.codes() for path, q in _frozen(graphdef, s)}, state)
    zeros = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), shapes)
    codes: Codes = monitor(state, zeros)[0]
    return codes


def _frozen(graphdef: Any, state: TrainState) -> list[tuple[str, Any]]:
    model = nnx.merge(graphdef, state.params, state.rest)
    # Sorted, because jit returns dictionaries so, and `numbers` has to have the order of `codes`.
    return sorted((path, layer.freeze_kernel()) for path, layer in layers_with_codes(model))


def layers_with_codes(model: nnx.Module) -> list[tuple[str, Any]]:
    """The layers whose kernel is quantized; others may quantize activations only."""
    return [
        (p, layer) for p, layer in lb.quantized_layers(model) if layer.scheme.weight is not None
    ]


def describe(codes: Codes, numbers: Any) -> dict[str, Any]:
    """One metrics row: the means over all weights, and every layer's own numbers.

    Returns: `{"flips", "saturation", "scale", "layers": {path: {...}}}`; empty for a float model.
    """
    if not codes:
        return {}
    table = np.asarray(numbers, np.float64)
    weights = np.array([codes[path].size for path in codes], np.float64)
    means = weights @ table / weights.sum()
    layers = {
        path: dict(zip(NAMES, row.tolist(), strict=True))
        for path, row in zip(codes, table, strict=True)
    }
    return dict(zip(NAMES, means.tolist(), strict=True)) | {"layers": layers}
