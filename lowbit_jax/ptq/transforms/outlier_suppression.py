"""Outlier Suppression+: channels shifted to their middle and scaled down to a common bound."""

import dataclasses
from typing import ClassVar, override

import jax.numpy as jnp
from flax import nnx

from lowbit_jax.ptq.stage import BlockWork, Stage
from lowbit_jax.ptq.transforms.folding import (
    Which,
    check_which,
    fold_scale,
    fold_shift,
    links_of,
    shift_refusal,
    to_source,
)
from lowbit_jax.ptq.transforms.observe import features
from lowbit_jax.ptq.transforms.search import Candidates, output_errors
from lowbit_jax.walk import layers


@dataclasses.dataclass(frozen=True)
class OutlierSuppression(Stage):
    """Outlier Suppression+ (arXiv:2304.09145): the inputs X of a link's layers become (X - z) / s,

        z_j = (max X_j + min X_j) / 2,    s_j = max(1, max|X_j - z_j| / t)

    with one threshold t for all channels, searched for the least squared error of the link's output
    with its inputs and kernels rounded to nearest. z and s are folded into what makes X and
    into kernels and biases behind it.

    A shift needs biases on both sides. Linear layers without one get one; an RMSNorm has none to
    give, so that channels behind it are only scaled, which a message says once a link.

    Differences: t is searched on `grid` even steps below the largest range. Calibrated (static)
    ranges are those of each sequence during the search.

    Attributes:
        grid: Thresholds tried.
        links: "all", or "norms" only.
        shift: Whether channels are shifted where they can be; it adds biases to a model that was
            built without.
    """

    grid: int = 40
    links: Which = "all"
    shift: bool = True

    transforms: ClassVar[bool] = True

    def __post_init__(self):
        if self.grid < 1:
            raise ValueError(f"OutlierSuppression(grid={self.grid}): tries at least one threshold.")
        check_which("OutlierSuppression", self.links)

    @override
    def flops(self, shapes, tokens, samples) -> float:
        return self.grid * super().flops(shapes, tokens, samples)

    @override
    def block(self, work: BlockWork) -> None:
        links = links_of(work, "OutlierSuppression", self.links)
        if not links:
            return
        seen, modules = features(work, links), dict(layers(work.original))
        block = nnx.clone(work.original)
        for link in links:
            low = to_source(seen[link.source].low, link, "min")
            high = to_source(seen[link.source].high, link, "max")
            refusal = shift_refusal(modules, link) if self.shift else "shift=False"
            if self.shift and refusal:
                work.note(link.source, {"message": f"scaled but not shifted: {refusal}."})
            shift = None if refusal else (high + low) / 2
            extent = jnp.maximum(jnp.abs(low), jnp.abs(high)) if refusal else (high - low) / 2
            shares = 1 - jnp.arange(self.grid, dtype=jnp.float32) / self.grid
            thresholds = jnp.maximum(jnp.max(extent) * shares, 1e-30)
            scales = jnp.maximum(extent[None, :] / thresholds[:, None], 1.0)
            errors = output_errors(work, link, Candidates(scales, shift), activations=True)
            best = int(jnp.argmin(errors))
            if shift is not None:
                fold_shift(block, link, shift)
            fold_scale(block, link, scales[best])
            figures = {"threshold": float(thresholds[best]), "shifted": shift is not None}
            work.note(link.source, figures | {"error_after": float(errors[best])})
        work.transform(block)
