"""What a reconstruction learns: variables, and the kernel that they make.

A kernel on its way to the grid passes through four hands: the weights themselves, their range,
what decides the rounding, and the saturation of the format,

    w -> w / scale -> rounded -> saturated -> (levels - zero_point) * scale

and each variable takes one of them over. Methods of the literature are sets of variables: AdaRound
learns the rounding; AutoRound an offset before it and shares of the range; OmniQuant the clipping
of the range (and the scales between norm and kernel); EfficientQAT's block phase weights, scales
and zero points.
"""

import abc
import dataclasses
from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from lowbit_jax.blocks import BlockView
from lowbit_jax.estimators import ste
from lowbit_jax.formats import IntGrid
from lowbit_jax.grid import Range, effective_scale, from_levels
from lowbit_jax.spec import QuantSpec

Parameters = dict[str, Array]


class Start(NamedTuple):
    """Where the reconstruction of one kernel starts.

    Attributes:
        weight: float32 [stack.., K, N].
        range: On whose grid.
    """

    weight: Float[Array, "*stack k n"]
    range: Range


@dataclasses.dataclass(frozen=True)
class Variable(abc.ABC):
    """Something about every kernel that is learned; finals are frozen.

    Attributes:
        lr: Its learning rate, before the optimizer's decay.
    """

    lr: float

    @abc.abstractmethod
    def init(self, start: Start, spec: QuantSpec) -> Parameters:
        """Its parameters for one kernel.

        Raises:
            NotImplementedError: It does not fit the spec.
        """

    def weight(self, parameters: Parameters, weight: Array) -> Array:
        """The weights to be rounded."""
        return weight

    def range(self, parameters: Parameters, range_: Range, spec: QuantSpec) -> Range:
        """The range, differentiable, not yet rounded to what is stored."""
        return range_

    def offset(self, parameters: Parameters) -> Array | None:
        """What is added to the weights, in units of the scale, before they are rounded."""
        return None

    def levels(self, parameters: Parameters, start: Start, spec: QuantSpec) -> Array | None:
        """The integers themselves, soft while training; None where it does not decide them."""
        return None

    def hard_levels(self, parameters: Parameters, start: Start, spec: QuantSpec) -> Array | None:
        """The integers in the end."""
        return None

    def penalty(self, parameters: Parameters, progress: Array) -> Array | float:
        """What is added to the objective; `progress` runs from 0 to 1."""
        return 0.0

    def project(self, parameters: Parameters) -> Parameters:
        """The parameters, brought back to where they are allowed to be after a step."""
        return parameters


def initial(variables: Sequence[Variable], start: Start, spec: QuantSpec) -> list[Parameters]:
    """The parameters of all variables for one kernel.

    Raises:
        NotImplementedError: Its scales are quantized, so that none moves alone; or a variable that
            does not fit the spec.
    """
    if spec.second is not None:
        raise NotImplementedError(
            f"reconstruction: moves every scale on its own, which {spec.second.describe()} do not. "
            "Use GPTQ() or RoundToNearest(), or a spec without a second level."
        )
    return [variable.init(start, spec) for variable in variables]


def learned_range(
    variables: Sequence[Variable], parameters: Sequence[Parameters], start: Start, spec: QuantSpec
) -> Range:
    """The range that the variables make, stored precision in the forward pass."""
    range_ = start.range
    for variable, values in zip(variables, parameters, strict=True):
        range_ = variable.range(values, range_, spec)
    scale = range_.scale
    rounded = jax.lax.stop_gradient(spec.scale_format.round(jnp.abs(scale)))
    rounded = jnp.where(scale < 0, -rounded, rounded)
    zero = range_.zero_point
    if zero is not None:
        zero = ste(zero, jnp.clip(jnp.round(zero), 0.0, np.float32(spec.format.max)))
    return range_._replace(scale=ste(scale, rounded), zero_point=zero)


def learned_kernel(
    variables: Sequence[Variable], parameters: Sequence[Parameters], start: Start, spec: QuantSpec
) -> Float[Array, "*stack k n"]:
    """The kernel that training sees, differentiable in all parameters."""
    range_ = learned_range(variables, parameters, start, spec)
    view = BlockView.of(start.weight.shape, spec)
    scale = view.split_scale(effective_scale(range_))
    levels = _soft_levels(variables, parameters, start, spec)
    if levels is None:
        levels = view.merge(view.split(_weights(variables, parameters, start)) / scale)
        for variable, values in zip(variables, parameters, strict=True):
            offset = variable.offset(values)
            levels = levels if offset is None else levels + offset
        if range_.zero_point is None:
            low, high = limits(spec)
            clipped = jnp.clip(levels, low, high)
            levels = ste(clipped, spec.format.round(clipped))
        else:
            levels = ste(levels, jnp.round(levels))
    levels = view.split(levels)
    if range_.zero_point is not None:
        zero = view.split_scale(range_.zero_point)
        levels = jnp.clip(levels + zero, 0.0, np.float32(spec.format.max)) - zero
    else:
        levels = jnp.clip(levels, *limits(spec))
    return view.merge(levels * scale)


def settled(
    variables: Sequence[Variable],
    parameters: Sequence[Parameters],
    start: Start,
    spec: QuantSpec,
) -> tuple[Array, Range, Array]:
    """The kernel on its grid in the end, its range, and the weights behind it."""
    range_ = jax.lax.stop_gradient(learned_range(variables, parameters, start, spec))
    view = BlockView.of(start.weight.shape, spec)
    zero = None if range_.zero_point is None else view.split_scale(range_.zero_point)
    hard = None
    for variable, values in zip(variables, parameters, strict=True):
        found = variable.hard_levels(values, start, spec)
        hard = found if found is not None else hard
    scale = view.split_scale(effective_scale(range_))
    latent = view.split(_weights(variables, parameters, start)) / scale
    for variable, values in zip(variables, parameters, strict=True):
        offset = variable.offset(values)
        latent = latent if offset is None else latent + view.split(offset)
    if hard is not None:
        levels = view.split(hard)
    elif zero is not None:
        levels = jnp.round(latent)
    else:
        levels = latent
    if zero is not None:
        levels = jnp.clip(levels + zero, 0.0, np.float32(spec.format.max))
        around = levels - zero
    else:
        levels = around = spec.format.round(levels)
    weight = from_levels(levels, range_, view, jnp.float32)
    # A little less than half a step away, the weights behind it still round to the same levels.
    # Other formats than integers have no one step, and keep nothing.
    room = 0.45 if isinstance(spec.format, IntGrid) else 0.0
    behind = view.merge((around + jnp.clip(latent - around, -room, room)) * scale)
    return weight, range_, behind if room else weight


def limits(spec: QuantSpec) -> tuple[np.float32, np.float32]:
    """Smallest and largest value of a symmetric format."""
    fmt = spec.format
    if isinstance(fmt, IntGrid):
        return np.float32(fmt.qmin), np.float32(fmt.qmax)
    values = np.asarray(fmt.decode(jnp.arange(2**fmt.bits, dtype=jnp.uint8)))
    return np.float32(np.nanmin(values)), np.float32(np.nanmax(values))


def _weights(
    variables: Sequence[Variable], parameters: Sequence[Parameters], start: Start
) -> Array:
    weight = start.weight
    for variable, values in zip(variables, parameters, strict=True):
        weight = variable.weight(values, weight)
    return weight


def _soft_levels(
    variables: Sequence[Variable], parameters: Sequence[Parameters], start: Start, spec: QuantSpec
) -> Array | None:
    levels = None
    for variable, values in zip(variables, parameters, strict=True):
        found = variable.levels(values, start, spec)
        levels = found if found is not None else levels
    return levels
