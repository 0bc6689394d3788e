"""Quantizer = spec + how its range is found + how its gradient flows; their registry."""

import abc
import dataclasses
import difflib
from typing import Any, ClassVar

import jax.numpy as jnp
from jaxtyping import Array, Float

from lowbit_jax import formats
from lowbit_jax.calibrate import Range
from lowbit_jax.formats import Learned
from lowbit_jax.qtensor import QTensor, encode
from lowbit_jax.spec import QuantSpec

State = dict[str, Array]

_REGISTRY: dict[str, type["Quantizer"]] = {}


@dataclasses.dataclass(frozen=True)
class Quantizer(abc.ABC):
    """How one array is quantized while it trains; finals are frozen and registered by name.

    Law: freeze(x, s).dequantize() equals fake_quant(x, s) bit for bit: eager, jitted, vmapped,
    scanned, sharded.

    Attributes:
        spec: The grid.
    """

    spec: QuantSpec

    trainable: ClassVar[tuple[str, ...]] = ()
    """Names of the state's leaves that an optimizer trains; the others are statistics."""
    symmetric: ClassVar[bool] = True
    """Which specs it takes: symmetric ones, or those with zero points."""
    observes: ClassVar[bool] = False
    """Whether, as a kernel's, it follows the weights by `observe` while they train."""
    starts: ClassVar[tuple[str, ...]] = ()
    """Names of trainable leaves that hold no number until `observe` has seen activations."""
    learns_values: ClassVar[bool] = False
    """Whether it takes formats whose values are learned, `formats.Learned`, and only those."""
    two_levels: ClassVar[bool] = False
    """Whether it takes specs whose scales are quantized in their turn."""

    def __post_init__(self):
        self._check_symmetry()
        if isinstance(self.spec.format, Learned) != self.learns_values:
            takes = [fmt.name for fmt in formats.LEARNED]
            word = "only" if self.learns_values else "not"
            raise NotImplementedError(
                f"{type(self).__name__}: takes {word} formats whose values are learned, of which "
                f"there are {takes}; this is {self.spec.format.name}."
            )
        if self.spec.second is not None and not self.two_levels:
            raise NotImplementedError(
                f"{type(self).__name__}: takes scales that are stored as they are, not "
                f"{self.spec.second.describe()}. Absmax, MinMax, AbsMean and FixedRange take those."
            )

    def _check_symmetry(self) -> None:
        """Raises ValueError for a spec with, or without, zero points that it does not take."""
        if self.spec.symmetric != self.symmetric:
            takes = "symmetric specs" if self.symmetric else "specs with zero points"
            raise ValueError(f"{type(self).__name__}: takes {takes} only, not {self.spec}.")

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        if "shared_part" not in vars(cls):  # those are no quantizers yet
            _REGISTRY[cls.__name__] = cls

    def init(self, x: Float[Array, "..."]) -> State:
        """State for an array like `x`; empty where the range is a function of the array."""
        return {}

    def observe(self, x: Float[Array, "..."], state: State) -> State:
        """The state after seeing `x`.

        Of activations: changes statistics only (and trainable ranges that calibration starts, see
        `starts`), and only while calibrating. Of kernels: see `surgery.observe_kernels`.
        """
        return state

    @abc.abstractmethod
    def range(self, x: Float[Array, "..."], state: State) -> Range:
        """The range that `fake_quant` and `freeze` share."""

    @abc.abstractmethod
    def fake_quant(self, x: Float[Array, "..."], state: State) -> Float[Array, "..."]:
        """Float to float on the grid, in the dtype of `x`; differentiable."""

    def freeze(self, x: Float[Array, "..."], state: State) -> QTensor:
        """The packed array."""
        return encode(x, self.spec, self.range(x, state))

    def to_dict(self) -> dict[str, Any]:
        """The quantizer as JSON-able values, readable without jax."""
        fields = {f.name: getattr(self, f.name) for f in dataclasses.fields(self)}
        return {"type": type(self).__name__} | fields | {"spec": self.spec.to_dict()}


def from_dict(data: dict[str, Any]) -> Quantizer:
    """The inverse of `Quantizer.to_dict`.

    Raises:
        ValueError: An unknown type (the message lists the nearest) or unknown keys.
    """
    fields = dict(data)
    name = fields.pop("type", None)
    if name not in _REGISTRY:
        near = difflib.get_close_matches(str(name), _REGISTRY) or sorted(_REGISTRY)
        raise ValueError(f"no quantizer is named {name!r}. Nearest: {near}.")
    cls = _REGISTRY[name]
    known = {f.name for f in dataclasses.fields(cls)}
    if set(fields) - known or "spec" not in fields:
        raise ValueError(f"{name}: keys {sorted(fields)} are not of {sorted(known)}.")
    return cls(**fields | {"spec": QuantSpec.from_dict(fields["spec"])})


def as_row(stat: Array, ndim: int) -> Array:
    """A statistic of one element, at the rank of the activations that it is used with."""
    return jnp.reshape(stat, (1,) * ndim)
