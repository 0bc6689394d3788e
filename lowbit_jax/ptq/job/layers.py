"""What quantization did to each layer: the rows of a run's report."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from lowbit_jax.blocks import BlockView
from lowbit_jax.grid import effective_scale
from lowbit_jax.nn import PackedTwin
from lowbit_jax.ptq.layers import get_matrix
from lowbit_jax.qtensor import QTensor
from lowbit_jax.scheme import LayerScheme
from lowbit_jax.walk import layers


def layer_rows(
    float_model: nnx.Module, packed: nnx.Module, events: Sequence[Mapping[str, Any]]
) -> list[dict[str, Any]]:
    """One row for every layer whose kernel is quantized, in the model's order.

    Args:
        float_model: Behind the transforms, if there were any.
        packed: What became of it.
        events: The layers' rows of a `ptq.Report`; later figures of a layer replace earlier ones.

    Returns: "path", "scheme", "bits" (per weight, with scales), "sqnr_db" of the weights, "clipped"
        (share of weights more than half a scale beyond the grid's ends), and the events' figures.
    """
    figures: dict[str, dict[str, Any]] = {}
    for event in events:
        where = "/".join(part for part in (event["block"], event["layer"]) if part)
        own = {k: v for k, v in event.items() if k not in ("block", "layer", "kind")}
        figures.setdefault(where, {}).update(own)
    floats = dict(layers(float_model))
    rows = []
    for path, twin in layers(packed):
        if not isinstance(twin, PackedTwin):
            continue
        q = twin.freeze_kernel()
        weight = get_matrix(floats[path]).astype(jnp.float32)
        signal, noise, clipped = (float(x) for x in _measure(weight, q))
        row = {
            "path": path,
            "scheme": _describe(twin.scheme),
            "bits": q.bits_per_weight,
            "sqnr_db": 10 * math.log10(max(signal, 1e-30) / max(noise, 1e-30)),
            "clipped": clipped,
        }
        rows.append(row | figures.get(path, {}))
    return rows


def _describe(scheme: LayerScheme) -> str:
    """Formats and granularities; who found the ranges stands in the report's head."""
    parts = {"": scheme.weight, "input ": scheme.input, "output ": scheme.output}
    return ", ".join(f"{name}{q.spec.describe()}" for name, q in parts.items() if q is not None)


@jax.jit
def _measure(weight: Float[Array, "*stack k n"], q: QTensor) -> tuple[Array, Array, Array]:
    """Energy of the weights, energy of their error, and the share beyond the grid's ends."""
    error = weight - q.dequantize().astype(jnp.float32)
    return jnp.sum(weight**2), jnp.sum(error**2), clipped_share(weight, q)


def clipped_share(weight: Float[Array, "*stack k n"], q: QTensor) -> Float[Array, ""]:
    """Share of the weights more than half a scale beyond the ends of their block's grid."""
    spec, range_ = q.spec, q.range()
    view = BlockView.of(weight.shape, spec)
    levels = spec.format.round(spec.format.decode(jnp.arange(2**spec.bits, dtype=jnp.uint8)))
    scale = view.split_scale(effective_scale(range_))
    zero = 0.0 if range_.zero_point is None else view.split_scale(range_.zero_point)
    ends = [(end - zero) * scale for end in (levels.min() - 0.5, levels.max() + 0.5)]
    # A negative scale turns the grid around.
    low, high = jnp.minimum(*ends), jnp.maximum(*ends)
    split = view.split(weight)
    return jnp.mean((split < low) | (split > high))
