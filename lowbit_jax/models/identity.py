"""A module that does nothing: what is left of one that was folded into its neighbour."""

from typing import Any

from flax import nnx
from jaxtyping import Array


class Identity(nnx.Module):
    """Returns its first argument; it stands where another module stood, so that calls stay."""

    def __call__(self, x: Array, *args: Any, **kwargs: Any) -> Array:
        """The argument itself."""
        return x
