"""Which layers hurt most: each rounded to nearest on its own, before any bits are chosen.

    print(lb.sensitivity(model, batches))

The harm of a layer is how far the model's outputs move when its kernel alone is quantized: by
default the mean KL divergence of the float model's next-token distribution from the changed one's.
Kernels are swapped, never the model's structure, so that one compiled program serves all layers.
"""

import dataclasses
import functools
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from lowbit_jax.grid import snap
from lowbit_jax.ptq.layers import get_matrix, kernel_variable, set_matrix
from lowbit_jax.ptq.plan import Plan, make_plan
from lowbit_jax.ptq.ranges import find_range
from lowbit_jax.recipe import Recipe, Rule
from lowbit_jax.spec import QuantSpec
from lowbit_jax.walk import layers


@dataclasses.dataclass(frozen=True)
class LayerHarm:
    """The harm of one layer.

    path: Of the layer in the model.
    harm: Increase of the loss by scheme, in the order that was asked for.
    """

    path: str
    harm: dict[str, float]

    @property
    def most(self) -> float:
        """The largest of them."""
        return max(self.harm.values())


@dataclasses.dataclass(frozen=True)
class Sensitivity:
    """The rows of all layers, the most harmful first; printing it gives a table."""

    rows: tuple[LayerHarm, ...]

    def to_dict(self) -> dict[str, dict[str, float]]:
        """Path -> scheme -> harm, in the same order."""
        return {row.path: dict(row.harm) for row in self.rows}

    def __str__(self) -> str:
        schemes = list(self.rows[0].harm)
        width = max(len("layer"), *(len(row.path) for row in self.rows))
        columns = [max(10, len(scheme)) for scheme in schemes]

        def line(first: str, cells: Iterable[str]) -> str:
            padded = (cell.rjust(size) for cell, size in zip(cells, columns, strict=True))
            return "  ".join([first.ljust(width), *padded])

        body = [line(row.path, (f"{x:.3e}" for x in row.harm.values())) for row in self.rows]
        rule = "  ".join("-" * size for size in (width, *columns))
        return "\n".join([line("layer", schemes), rule, *body])

    __repr__ = __str__


def mean_kl(reference: Float[Array, "... n"], output: Float[Array, "... n"]) -> Float[Array, ""]:
    """Mean KL(softmax(reference) || softmax(output)) over all but the last axis, in nats."""
    log_p, log_q = (jax.nn.log_softmax(x.astype(jnp.float32)) for x in (reference, output))
    return jnp.mean(jnp.sum(jnp.exp(log_p) * (log_p - log_q), axis=-1))


def _call(model: nnx.Module, batch: Any) -> Array:
    return model(batch)  # type: ignore[operator]


def sensitivity(
    model: nnx.Module,
    batches: Iterable[Any],
    schemes: Sequence[str] = ("w4a16", "w3a16", "w2a16"),
    *,
    blocks: str = r"layers/\d+",
    include: Sequence[str] = (),
    forward: Callable[[nnx.Module, Any], Array] = _call,
    loss: Callable[[Array, Array], Array] = mean_kl,
    on_layer: Callable[[int, int], None] | None = None,
) -> Sensitivity:
    """Measures every layer of the blocks alone; activations stay float.

    Args:
        model: Float; left untouched.
        batches: As `forward` takes them; a few are enough. The outputs on all of them are held.
        schemes: Presets whose weights are tried, rounded to nearest in the ranges of least error.
        blocks: Pattern that matches the whole path of every block.
        include: Paths of further layers.
        forward: `forward(model, batch) -> outputs`. Pass the same function every time: a new one is
            compiled anew.
        loss: `loss(float outputs, outputs)`: a mean over the batch, 0 where both are equal.
        on_layer: Called with (layers done, layers in all).

    Raises:
        ValueError: No batch or scheme, unknown presets, no blocks, lengths without groups.
        FloatingPointError: The loss is not finite.
    """
    batches = list(batches)
    if not batches or not schemes:
        raise ValueError("sensitivity: needs at least one batch and one scheme.")
    plans = {
        scheme: make_plan(model, Recipe(Rule(".*", scheme)), blocks, include) for scheme in schemes
    }
    specs = _specs(plans)
    changed = nnx.clone(model)
    modules = dict(layers(changed))
    references = [_outputs(changed, batch, forward) for batch in batches]
    rows = []
    for number, (path, by_scheme) in enumerate(specs.items()):
        layer = modules[path]
        kernel, matrix = kernel_variable(layer)[...], get_matrix(layer).astype(jnp.float32)
        harm = {}
        for scheme, spec in by_scheme.items():
            set_matrix(layer, _rounded(matrix, spec))
            harm[scheme] = _mean_loss(changed, batches, references, forward, loss)
            if not jnp.isfinite(harm[scheme]):
                raise FloatingPointError(
                    f"{path}, {scheme}: the model's outputs are not finite. Token ids outside the "
                    "vocabulary do that, and so do damaged weights."
                )
        kernel_variable(layer)[...] = kernel
        rows.append(LayerHarm(path, harm))
        if on_layer is not None:
            on_layer(number + 1, len(specs))
    return Sensitivity(tuple(sorted(rows, key=lambda row: -row.most)))


def _specs(plans: dict[str, Plan]) -> dict[str, dict[str, QuantSpec]]:
    """Path -> scheme -> spec of the kernel."""
    found: dict[str, dict[str, QuantSpec]] = {}
    for name, plan in plans.items():
        for path, scheme in plan.schemes.items():
            if scheme.weight is not None:
                found.setdefault(path, {})[name] = scheme.weight.spec
    return found


@functools.partial(jax.jit, static_argnums=1)
def _rounded(matrix: Array, spec: QuantSpec) -> Array:
    return snap(matrix, spec, find_range(matrix, spec, "mse"))


@functools.partial(jax.jit, static_argnums=(0, 1))
def _forward(forward: Any, graph: Any, state: Any, batch: Any) -> Array:
    return forward(nnx.merge(graph, state), batch)


@functools.partial(jax.jit, static_argnums=(0, 1, 2))
def _loss(forward: Any, loss: Any, graph: Any, state: Any, batch: Any, reference: Array) -> Array:
    return loss(reference, forward(nnx.merge(graph, state), batch))


def _outputs(model: nnx.Module, batch: Any, forward: Any) -> Array:
    return _forward(forward, *nnx.split(model), batch)


def _mean_loss(
    model: nnx.Module, batches: list[Any], references: list[Array], forward: Any, loss: Any
) -> float:
    """The loss over all batches, each weighted with its outputs."""
    graph, state = nnx.split(model)
    total, weight = 0.0, 0
    for batch, reference in zip(batches, references, strict=True):
        total += reference.size * float(_loss(forward, loss, graph, state, batch, reference))
        weight += reference.size
    return total / weight
