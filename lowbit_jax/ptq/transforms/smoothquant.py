"""SmoothQuant: part of the activations' range moved into the weights."""

import dataclasses
from typing import ClassVar, override

import jax.numpy as jnp
from flax import nnx

from lowbit_jax.ptq.stage import BlockWork, Stage
from lowbit_jax.ptq.transforms.folding import (
    Which,
    check_which,
    fold_scale,
    links_of,
    positive,
    row_magnitudes,
    to_source,
)
from lowbit_jax.ptq.transforms.observe import features


@dataclasses.dataclass(frozen=True)
class SmoothQuant(Stage):
    """SmoothQuant (arXiv:2211.10438): divides feature j of the inputs X of a link's layers W by

        s_j = max|X_j|^alpha / max|W_j|^(1 - alpha)    (Eq. 4)

    and multiplies their rows by it, where max|X_j| is over all calibration tokens and max|W_j| over
    the outputs of all layers that share the input. 1/s is folded into the norm (or the linear
    layer) in front, so that inference pays nothing.

    Differences: a feature that was never excited, or whose weights are all zero, keeps s = 1 (the
    authors' program clips both maxima at 1e-5). Under grouped-query attention the values' maxima
    are over the repeats, which share one scale.

    Attributes:
        alpha: Share of the difficulty that moves into the weights, in [0, 1].
        links: "norms": where a norm makes the inputs, as the paper does; "all": also
            value -> out and up -> down.
    """

    alpha: float = 0.5
    links: Which = "norms"

    transforms: ClassVar[bool] = True

    def __post_init__(self):
        if not 0 <= self.alpha <= 1:
            raise ValueError(f"SmoothQuant(alpha={self.alpha}): alpha is a share in [0, 1].")
        check_which("SmoothQuant", self.links)

    @override
    def block(self, work: BlockWork) -> None:
        links = links_of(work, "SmoothQuant", self.links)
        if not links:
            return
        seen = features(work, links)
        block = nnx.clone(work.original)
        for link in links:
            inputs = seen[link.source].absmax
            rows = [row_magnitudes(work.layer(path)) for path in link.targets]
            inputs = to_source(inputs, link, "max")
            weights = to_source(jnp.max(jnp.stack(rows), axis=0), link, "max")
            scale = inputs**self.alpha / weights ** (1 - self.alpha)
            fold_scale(block, link, positive(scale, inputs, weights))
        work.transform(block)
