"""Cross-layer equalization: successive layers' weights brought to the same ranges, without data."""

import dataclasses
from typing import ClassVar, override

import jax.numpy as jnp
from flax import nnx

from lowbit_jax.ptq.stage import BlockWork, Stage
from lowbit_jax.ptq.transforms.folding import (
    column_magnitudes,
    fold_scale,
    links_of,
    positive,
    row_magnitudes,
    to_source,
)
from lowbit_jax.surgery import NORMS
from lowbit_jax.walk import layers


@dataclasses.dataclass(frozen=True)
class CrossLayerEqualization(Stage):
    """Cross-layer equalization (arXiv:1906.04721, Eq. 11) scales channel i between two layers by

        s_i = sqrt(r1_i / r2_i),    W1 / s,    s W2

    so that its largest magnitudes r1_i among the columns of W1 and r2_i among the rows of W2 become
    equal. It goes through every link whose source is a linear or convolutional layer; between them
    may stand what lets a positive factor through (ReLU, the weights of attention, a gate).

    Attributes:
        passes: Over all links; layers that are in two links need several.
    """

    passes: int = 1

    transforms: ClassVar[bool] = True

    def __post_init__(self):
        if self.passes < 1:
            raise ValueError(f"CrossLayerEqualization(passes={self.passes}): needs at least one.")

    @override
    def block(self, work: BlockWork) -> None:
        block = nnx.clone(work.original)
        modules = dict(layers(block))
        links = [
            link
            for link in links_of(work, "CrossLayerEqualization", "all")
            if not isinstance(modules[link.source], NORMS)
        ]
        for _ in range(self.passes):
            for link in links:
                rows = [row_magnitudes(modules[path]) for path in link.targets]
                behind = to_source(jnp.max(jnp.stack(rows), axis=0), link, "max")
                before = column_magnitudes(modules[link.source])
                fold_scale(block, link, positive(jnp.sqrt(before / behind), before, behind))
        if links:
            work.transform(block)
