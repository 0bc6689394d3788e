"""Progressive groups: an integer scale per group, a float one per output."""

import dataclasses
from typing import ClassVar, override

from jaxtyping import Array, Float

from lowbit_jax import calibrate
from lowbit_jax.calibrate import Range
from lowbit_jax.calibrate.progressive import require_progressive
from lowbit_jax.quantizers.base import State
from lowbit_jax.quantizers.ranges import StraightThrough


@dataclasses.dataclass(frozen=True)
class Progressive(StraightThrough):
    """QServe's weights: 4-bit groups inside int8 outputs (arXiv:2405.04532).

    The range is `calibrate.progressive`'s, found anew at every call. What the paper adds around it
    (rotation, smoothing, reordering) are transforms of `ptq`.
    """

    symmetric: ClassVar[bool] = False
    two_levels: ClassVar[bool] = True

    def __post_init__(self):
        super().__post_init__()
        require_progressive("Progressive", self.spec)

    @override
    def range(self, x: Float[Array, "..."], state: State) -> Range:
        return calibrate.progressive(x, self.spec)
