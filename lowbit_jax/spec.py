"""QuantSpec: how one array, seen as a matrix [..., K, N], is quantized.

K is the contraction, N the outputs, all leading axes a stack. Activations are [..., K]: `PerToken`
counts K last.
"""

import dataclasses
from collections.abc import Sequence
from typing import Any, Literal

from lowbit_jax import formats
from lowbit_jax.formats import Format, IntGrid, Learned, Minifloat
from lowbit_jax.scale_formats import FLOAT32, SCALE_FORMATS, ScaleFormat


@dataclasses.dataclass(frozen=True)
class Block:
    """One scale per block of `k` x `n` elements of every trailing matrix [K, N].

    Attributes:
        k: Length of a block along K, in elements; None = all of K.
        n: Length of a block along N, in elements; None = all of N.
    """

    k: int | None = None
    n: int | None = None

    def __post_init__(self):
        for name, size in (("k", self.k), ("n", self.n)):
            if size is not None and size < 1:
                raise ValueError(f"Block({name}={size}): a block has at least 1 element.")

    @property
    def axis(self) -> int:
        """The axis of K."""
        return -2

    def sizes(self, shape: Sequence[int]) -> tuple[int, int]:
        """Lengths (k, n) of a block of an array of this shape, in elements."""
        *_, k, n = shape
        return self.k or k, self.n or n

    def describe(self) -> str:
        """The granularity in a few words."""
        named: dict[Any, str] = {(None, None): "per tensor", (None, 1): "per channel"}
        if (self.k, self.n) in named:
            return named[self.k, self.n]
        return f"in groups of {self.k}" if self.n == 1 else f"in blocks of {self.k} x {self.n}"


@dataclasses.dataclass(frozen=True)
class PerToken:
    """One scale per row [..., K] (or per `k` elements of it): for activations.

    Attributes:
        k: Length of a block along K, in elements; None = all of K.
    """

    k: int | None = None

    def __post_init__(self):
        if self.k is not None and self.k < 1:
            raise ValueError(f"PerToken(k={self.k}): a block has at least 1 element.")

    @property
    def axis(self) -> int:
        """The axis of K."""
        return -1

    def sizes(self, shape: Sequence[int]) -> tuple[int]:
        """Length (k,) of a block of an array of this shape, in elements."""
        return (self.k or shape[-1],)

    def describe(self) -> str:
        """The granularity in a few words."""
        return "per token" if self.k is None else f"per token in groups of {self.k}"


Granularity = Block | PerToken


def PerTensor() -> Block:
    """One scale per trailing matrix."""
    return Block(None, None)


def PerChannel() -> Block:
    """One scale per output (column)."""
    return Block(None, 1)


def PerGroup(size: int) -> Block:
    """One scale per `size` consecutive elements of a column."""
    return Block(size, 1)


@dataclasses.dataclass(frozen=True, kw_only=True)
class SecondLevel:
    """How scales that are quantized themselves are: `scale = value of a code * its scale + offset`.

    The scales [..., K / k, N / n] of an array [..., K, N] are seen transposed, [..., N / n, K / k],
    as a matrix of their own: codes are packed along N, which is long, in blocks of outputs.
    Double quantization (QLoRA, arXiv:2305.14314, section 3) has 8 bits with the mean as the offset;
    second-order groups (SpQR, arXiv:2306.03078) 3 bits between the ends of 16 scales,
    `int3_half` about the middle of the range; progressive groups (QServe, arXiv:2405.04532)
    integers per output, without an offset.

    Attributes:
        spec: Of the transposed scales; symmetric, in blocks, one level.
        offset: What is subtracted before they are rounded, float32: "mean" of each matrix of
            scales, "middle" of the extremes of each block; None: nothing.

    Raises:
        ValueError: A spec that scales cannot have.
    """

    spec: "QuantSpec"
    offset: Literal["mean", "middle"] | None = None

    def __post_init__(self):
        spec = self.spec
        simple = isinstance(spec.granularity, Block) and not (spec.has_global_scale or spec.second)
        if not simple or not spec.symmetric or isinstance(spec.format, Learned):
            raise ValueError(
                f"SecondLevel: scales are quantized in blocks, symmetrically, with one level of "
                f"scales of their own and a fixed format, not as {spec.describe()}."
            )
        if self.offset not in (None, "mean", "middle"):
            raise ValueError(
                f"SecondLevel(offset={self.offset!r}): known are None, 'mean' and 'middle'."
            )

    def scale_shape(self, scale_shape: Sequence[int]) -> tuple[int, ...]:
        """Shape of the scales of scales of this shape."""
        *lead, k, n = scale_shape
        return self.spec.scale_shape((*lead, n, k))

    def offset_shape(self, scale_shape: Sequence[int]) -> tuple[int, ...] | None:
        """Shape of the offsets of scales of this shape; None without."""
        if self.offset is None:
            return None
        return (*scale_shape[:-2], 1, 1) if self.offset == "mean" else self.scale_shape(scale_shape)

    def describe(self) -> str:
        """The level in a few words."""
        about = f" about their {self.offset}" if self.offset else ""
        return f"scales in {self.spec.describe()}{about}"


@dataclasses.dataclass(frozen=True, kw_only=True)
class QuantSpec:
    """How one array, seen as a matrix [..., K, N] (`PerToken`: [..., K]), is quantized.

    Attributes:
        format: What a code stands for.
        granularity: Which elements share a scale.
        symmetric: False: an integer zero point per scale, in `[0, 2**bits)`; needs an unsigned
            format.
        scale_format: How scales are stored; e4m3 comes with a float32 `global_scale` per trailing
            matrix.
        second: How the scales are quantized in their turn; None: they are stored as they are.

    Raises:
        ValueError: The format and `symmetric` contradict each other, or a second level that scales
            of this kind have not.
    """

    format: Format
    granularity: Granularity = Block(None, 1)
    symmetric: bool = True
    scale_format: ScaleFormat = FLOAT32
    second: SecondLevel | None = None

    def __post_init__(self):
        signed = not isinstance(self.format, IntGrid) or self.format.signed
        if signed != self.symmetric:
            other = f"int{self.format.bits}" if self.symmetric else f"uint{self.format.bits}"
            raise ValueError(
                f"QuantSpec(format={self.format.name}, symmetric={self.symmetric}): zero points "
                f"belong to unsigned formats and only to them. "
                f"Use symmetric={signed} or the format {other}."
            )
        if not self.symmetric and self.scale_format.name in ("e4m3", "e8m0"):
            raise NotImplementedError(
                f"QuantSpec: zero points with {self.scale_format.name} scales; no file format or "
                "kernel has them. Use float32, bfloat16 or float16 scales."
            )
        if self.scale_format.rounding == "even" and not isinstance(self.format, Minifloat):
            raise NotImplementedError(
                f"QuantSpec: {self.scale_format.key} scales round a magnitude to the mantissa of a "
                f"small float, and {self.format.name} has none. Use E8M0 or E8M0_CEIL."
            )
        if self.second and (self.scale_format != FLOAT32 or isinstance(self.granularity, PerToken)):
            raise ValueError(
                f"QuantSpec: a second level quantizes the float32 scales of blocks, not "
                f"{self.scale_format.key} scales {self.granularity.describe()}. Leave scale_format "
                "as it is: the second level says how they are stored."
            )

    @property
    def bits(self) -> int:
        """Width of one code, in bits."""
        return self.format.bits

    @property
    def has_global_scale(self) -> bool:
        """Whether a float32 factor per matrix multiplies the scales (NVFP4's second level)."""
        return self.scale_format.name == "e4m3"

    def scale_shape(self, shape: Sequence[int]) -> tuple[int, ...]:
        """Shape of the scale of an array of this shape; the ranks are equal.

        Raises:
            ValueError: An axis does not split into blocks; the message says which sizes would fit.
        """
        axes = -self.granularity.axis
        if len(shape) < axes:
            raise ValueError(
                f"an array of shape {tuple(shape)} cannot be quantized by {self.granularity}: "
                f"it needs at least {axes} axes."
            )
        sizes = self.granularity.sizes(shape)
        lead, trail = shape[: len(shape) - len(sizes)], shape[len(shape) - len(sizes) :]
        names = ("input", "output")
        for length, size, name in zip(trail, sizes, names, strict=False):
            if size and length % size:
                fits = [s for s in (256, 128, 64, 32, 16, 8) if length % s == 0]
                raise ValueError(
                    f"{name} axis of length {length} does not split into groups of {size} "
                    f"({length} = {length // size} * {size} + {length % size}). "
                    f"Group sizes that fit: {fits or 'none; use per-channel scales'}."
                )
        scales = (*lead, *(n // s if s else 1 for n, s in zip(trail, sizes, strict=True)))
        if self.second:
            try:
                self.second.scale_shape(scales)
            except ValueError as error:
                raise ValueError(f"scales of shape {scales}, transposed: {error}") from None
        return scales

    def describe(self) -> str:
        """The spec in a few words, such as 'int4 in groups of 128 with float16 scales'."""
        text = f"{self.format.name} {self.granularity.describe()}"
        if self.second:
            return f"{text}, {self.second.describe()}"
        scales = self.scale_format.key
        return text if scales == "float32" else f"{text} with {scales} scales"

    def to_dict(self) -> dict[str, Any]:
        """The spec as JSON-able values, readable without jax."""
        granularity: dict[str, Any] = {"type": type(self.granularity).__name__}
        granularity |= dataclasses.asdict(self.granularity)
        data = {
            "format": formats.to_key(self.format),
            "granularity": granularity,
            "symmetric": self.symmetric,
            "scale_format": self.scale_format.key,
        }
        if self.second:  # not in the files of before there was one
            data["second"] = {"spec": self.second.spec.to_dict(), "offset": self.second.offset}
        return data

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> "QuantSpec":
        """The inverse of `to_dict`; unknown keys and names are refused."""
        data = dict(data)
        known = {f.name for f in dataclasses.fields(cls)}
        if set(data) - known or "format" not in data:
            raise ValueError(f"QuantSpec: keys {sorted(data)} are not of {sorted(known)}.")
        kinds: dict[str, Any] = {"Block": Block, "PerToken": PerToken}
        if "granularity" in data:
            fields = dict(data["granularity"])
            kind = fields.pop("type", None)
            if kind not in kinds:
                raise ValueError(f"QuantSpec: granularity {kind!r} is not of {sorted(kinds)}.")
            sizes = {f.name for f in dataclasses.fields(kinds[kind])}
            if set(fields) - sizes:
                raise ValueError(f"{kind}: keys {sorted(fields)} are not of {sorted(sizes)}.")
            data["granularity"] = kinds[kind](**fields)
        if "scale_format" in data:
            if data["scale_format"] not in SCALE_FORMATS:
                raise ValueError(
                    f"QuantSpec: scale format {data['scale_format']!r} is not of "
                    f"{sorted(SCALE_FORMATS)}."
                )
            data["scale_format"] = SCALE_FORMATS[data["scale_format"]]
        if data.get("second") is not None:
            level = dict(data["second"])
            if set(level) != {"spec", "offset"}:
                raise ValueError(
                    f"QuantSpec: second has the keys {sorted(level)}, not ['offset', 'spec']."
                )
            data["second"] = SecondLevel(spec=cls.from_dict(level["spec"]), offset=level["offset"])
        return cls(**data | {"format": formats.from_key(data["format"])})
