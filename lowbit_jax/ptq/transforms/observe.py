"""What is seen of the inputs of a link's targets: extremes and means of every feature."""

from typing import Any, NamedTuple

import jax.numpy as jnp
from jaxtyping import Array, Float

from lowbit_jax.models.wiring import Link
from lowbit_jax.nn.views import MatrixView
from lowbit_jax.ptq.layers import float_class, view_of
from lowbit_jax.ptq.stage import BlockWork
from lowbit_jax.ptq.taps import Rows, fold


class Features(NamedTuple):
    """Figures of every input feature over all calibration tokens, [K].

    Attributes:
        absmax: Largest magnitude.
        low: Smallest value.
        high: Largest value.
        total: Sum of the magnitudes.
        tokens: Count of tokens, [].
    """

    absmax: Float[Array, " k"]
    low: Float[Array, " k"]
    high: Float[Array, " k"]
    total: Float[Array, " k"]
    tokens: Float[Array, ""]

    @property
    def mean(self) -> Float[Array, " k"]:
        """Mean magnitude."""
        return self.total / self.tokens


def features(work: BlockWork, links: list[Link]) -> dict[str, Features]:
    """The features that enter the targets of links in the float model, by the links' sources."""
    first = {link.targets[0]: link.source for link in links}
    start = {path: _start(work, path) for path in first}
    found = fold(work.original, work.chain, list(first), _update, start)
    return {source: found[path] for path, source in first.items()}


def _start(work: BlockWork, path: str) -> Features:
    layer = work.layer(path)
    view = view_of(layer)
    k = view.matrix_shape[-2] // _positions(float_class(layer).__name__, view)
    zeros = jnp.zeros(k, jnp.float32)
    infinite = jnp.full(k, jnp.inf, jnp.float32)
    return Features(zeros, infinite, -infinite, zeros, jnp.float32(0))


def _positions(name: str, view: MatrixView) -> int:
    """Rows of the matrix that belong to one feature: the positions of a convolution's window."""
    return view.matrix_shape[-2] // view.kernel_shape[-2] if name == "Conv" else 1


def _update(rows: Rows, carry: dict[str, Any]) -> dict[str, Any]:
    found = {}
    for path, seen in carry.items():
        x = rows[path].reshape(-1, seen.absmax.shape[0])
        magnitude = jnp.abs(x)
        found[path] = Features(
            jnp.maximum(seen.absmax, jnp.max(magnitude, axis=0)),
            jnp.minimum(seen.low, jnp.min(x, axis=0)),
            jnp.maximum(seen.high, jnp.max(x, axis=0)),
            seen.total + jnp.sum(magnitude, axis=0),
            seen.tokens + x.shape[0],
        )
    return found
