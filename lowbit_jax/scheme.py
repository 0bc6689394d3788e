"""LayerScheme: how one layer is quantized."""

import dataclasses
from typing import Any, Final, Literal

from lowbit_jax.quantizers import LSQ, PACT, Quantizer, StaticAbsmax, from_dict
from lowbit_jax.spec import Block, PerTensor


@dataclasses.dataclass(frozen=True)
class LayerScheme:
    """How one layer is quantized; None leaves that array float.

    Attributes:
        weight: Quantizer of the kernel, seen as a matrix [..., K, N].
        input: Quantizer of the activations that enter, [..., K].
        output: Quantizer of the activations that leave, [..., N].
        product: "float" multiplies the dequantized operands; "int8" multiplies the codes of linear
            and einsum layers as integers in the forward pass (both sides symmetric integers of at
            most 8 bits, the kernel with one scale per tensor or channel), with unchanged gradients.
        hadamard: Inputs and kernel of a `Linear` are quantized behind a Hadamard rotation of this
            many consecutive inputs, a power of two; 0: as they are. Products stay the same.
        backward: "float", or "mxfp4": both gradients of a `Linear`'s product are products of
            stochastically rounded MXFP4 numbers (`ops.fp4_training`), with the keys of a random
            stream of its own.

    Raises:
        ValueError: Nothing to quantize, an unknown product, a kernel per token or with a calibrated
            range, activations in blocks of a matrix.
        NotImplementedError: A learned range of activations.
    """

    weight: Quantizer | None = None
    input: Quantizer | None = None
    output: Quantizer | None = None
    product: Literal["float", "int8"] = "float"
    hadamard: int = 0
    backward: Literal["float", "mxfp4"] = "float"

    def __post_init__(self):
        if self.weight is None and self.input is None and self.output is None:
            raise ValueError("LayerScheme: nothing to quantize; a float layer's scheme is None.")
        if self.product not in ("float", "int8"):
            raise ValueError(f"LayerScheme: product={self.product!r} is not of ['float', 'int8'].")
        if self.backward not in ("float", "mxfp4"):
            raise ValueError(
                f"LayerScheme: backward={self.backward!r} is not of ['float', 'mxfp4']."
            )
        if self.hadamard < 0 or self.hadamard & (self.hadamard - 1):
            raise ValueError(f"LayerScheme: hadamard={self.hadamard} is no power of two.")
        if self.weight is not None:
            _check_kernel(self.weight)
        for part, quantizer in (("input", self.input), ("output", self.output)):
            if quantizer is not None:
                _check_activations(part, quantizer)

    def to_dict(self) -> dict[str, Any]:
        """The scheme as JSON-able values, without parts that are None and the float product."""
        parts = {name: getattr(self, name) for name in ("weight", "input", "output")}
        data: dict[str, Any] = {name: q.to_dict() for name, q in parts.items() if q is not None}
        options = {name: getattr(self, name) for name in _OPTIONS}
        return data | {name: o for name, o in options.items() if o != _OPTIONS[name]}

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> "LayerScheme":
        """The inverse of `to_dict`; unknown keys are refused."""
        known = {f.name for f in dataclasses.fields(cls)}
        if set(data) - known:
            raise ValueError(f"LayerScheme: keys {sorted(data)} are not of {sorted(known)}.")
        parts: dict[str, Any] = {k: v if k in _OPTIONS else from_dict(v) for k, v in data.items()}
        return cls(**parts)

    def describe(self) -> str:
        """The scheme in words: 'AbsMean ternary per tensor, input Absmax int8_narrow per token'."""
        parts = [
            (name, q)
            for name, q in (("", self.weight), ("input ", self.input), ("output ", self.output))
            if q is not None
        ]
        text = ", ".join(f"{name}{type(q).__name__} {q.spec.describe()}" for name, q in parts)
        text = text if self.product == "float" else f"{text}, int8 product"
        text = f"{text}, rotated by {self.hadamard}" if self.hadamard else text
        return text if self.backward == "float" else f"{text}, {self.backward} backward"


# What a scheme says beside its quantizers, and leaves out of JSON.
_OPTIONS: Final[dict[str, Any]] = {"product": "float", "hadamard": 0, "backward": "float"}


def _check_kernel(quantizer: Quantizer) -> None:
    if isinstance(quantizer, PACT) or quantizer.starts:
        raise ValueError(
            f"LayerScheme: weight={type(quantizer).__name__} learns a range of activations that it "
            "has to be calibrated for. For kernels use LSQ or DoReFa."
        )
    if isinstance(quantizer, StaticAbsmax):
        raise ValueError(
            "LayerScheme: weight=StaticAbsmax: a calibrated range is for activations, and no "
            "kernel is ever calibrated. Use Absmax, whose range follows the kernel."
        )
    if not isinstance(quantizer.spec.granularity, Block):
        raise ValueError(
            f"LayerScheme: a kernel is a matrix [K, N], and cannot have scales "
            f"{quantizer.spec.granularity.describe()}. Use PerTensor(), PerChannel() or "
            "PerGroup(size)."
        )


def _check_activations(part: str, quantizer: Quantizer) -> None:
    if isinstance(quantizer, LSQ):
        raise NotImplementedError(
            f"LayerScheme: {part}=LSQ: a learned range of activations has no data to start from "
            "here. Use Absmax per token, or StaticAbsmax, which is calibrated."
        )
    if quantizer.learns_values:
        raise NotImplementedError(
            f"LayerScheme: {part}={type(quantizer).__name__}: its values are those of weights. Use "
            "PACT, LSQPlus or N2UQ for learned activations."
        )
    granularity = quantizer.spec.granularity
    if isinstance(granularity, Block) and granularity != PerTensor():
        raise ValueError(
            f"LayerScheme: {part} {granularity.describe()}: blocks of a matrix would run over the "
            "tokens of a batch. Use PerToken(), PerToken(size) or PerTensor()."
        )
