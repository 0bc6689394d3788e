"""The activation functions that the classifiers can be built with, by name."""

from collections.abc import Callable
from typing import Final

from flax import nnx
from jaxtyping import Array

# The hard tanh is for networks whose layers take signs: sign(clip(x)) is sign(x), and a layer
# that takes no signs still has a nonlinear input (section 1.3 of arXiv:1602.02830).
ACTIVATIONS: Final[dict[str, Callable[[Array], Array]]] = {
    "relu": nnx.relu,
    "hard_tanh": nnx.hard_tanh,
}


def require_activation(where: str, name: str) -> None:
    """Refuses an unknown activation. Raises: ValueError: names `where` and those there are."""
    if name not in ACTIVATIONS:
        raise ValueError(
            f"{where}: activation {name!r} is not known. Known: {sorted(ACTIVATIONS)}."
        )
