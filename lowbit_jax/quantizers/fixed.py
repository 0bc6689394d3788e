"""A quantizer whose range was found beforehand."""

import dataclasses
from typing import ClassVar, override

import jax.numpy as jnp
from jaxtyping import Array, Float

from lowbit_jax import calibrate
from lowbit_jax.calibrate import Range
from lowbit_jax.grid import Second, snapped_scales
from lowbit_jax.quantizers.base import State
from lowbit_jax.quantizers.ranges import StraightThrough


@dataclasses.dataclass(frozen=True)
class FixedRange(StraightThrough):
    """The range is state: found once (by a PTQ solver, or read from a file) and kept.

    Takes every spec, with zero points or without. It starts from absmax (min-max), and whoever
    found a better one assigns `kernel_scale` and `kernel_zero_point`. A kernel that lies on the
    grid stays as it is.
    """

    two_levels: ClassVar[bool] = True

    @override
    def _check_symmetry(self) -> None:
        """Both kinds of spec are welcome."""

    @override
    def init(self, x: Float[Array, "..."]) -> State:
        found = calibrate.absmax if self.spec.symmetric else calibrate.minmax
        return range_state(found(x, self.spec))

    @override
    def range(self, x: Float[Array, "..."], state: State) -> Range:
        if (level := self.spec.second) is not None:
            second = state_range(state).second
            assert second is not None
            scale = snapped_scales(state["scale"].astype(jnp.float32), level, second)
            return Range(scale, state.get("zero_point"), second=second)
        scale = self.spec.scale_format.round(jnp.abs(state["scale"].astype(jnp.float32)))
        # Scale formats round magnitudes; a negative scale (GGUF's Q4_0) keeps its sign.
        scale = jnp.where(state["scale"] < 0, -scale, scale)
        return Range(scale, state.get("zero_point"), state.get("global_scale"))


def range_state(range_: Range) -> State:
    """A range as the state of `FixedRange`: its parts by name, without those that are None."""
    parts = range_._asdict()
    if range_.second is not None:
        parts |= {f"second_{name}": part for name, part in range_.second._asdict().items()}
    return {name: p for name, p in parts.items() if p is not None and name != "second"}


def state_range(state: State) -> Range:
    """The inverse of `range_state`."""
    second = None
    if "second_scale" in state:
        second = Second(state["second_scale"], state.get("second_offset"))
    parts = {name: part for name, part in state.items() if not name.startswith("second_")}
    return Range(**parts, second=second)
