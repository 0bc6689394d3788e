"""Folders of transformers whose linear layers are quantized: `quantization_config` of config.json.

Such a layer `model.layers.0.mlp.up_proj` has several tensors instead of its `.weight`. A
`QuantizedTensors` shows it as that one tensor [out, in], which can be read dequantized to float32
(`read`), or with its codes (`kernel`); the other tensors stay what they are.

A method is how one `quant_method` calls its tensors, what shape they stand for, and their codec.
"""

import abc
import re
from collections.abc import Collection, Mapping
from typing import Any, Final, override

import numpy as np
from jaxtyping import Float32

from lowbit_jax.formats import INT8_NARROW
from lowbit_jax.interop.codecs import awq, bitnet, bitsandbytes, gptq
from lowbit_jax.interop.codecs.parts import Kernel
from lowbit_jax.interop.fields import Fields
from lowbit_jax.interop.safetensors_files import SafeTensors
from lowbit_jax.quantizers import Absmax, Quantizer
from lowbit_jax.spec import PerToken, QuantSpec

_MARK: Final = ".weight"


class Method(abc.ABC):
    """How one quantization method stores a layer."""

    marks: tuple[str, ...]
    """Parts by which a quantized layer is known; a layer has one of them."""
    parts: Collection[str]
    """All that a layer may have."""

    @abc.abstractmethod
    def shape(self, layer: str, tensors: "QuantizedTensors") -> tuple[int, ...]:
        """The weight's shape (out, in), from the headers (and small tensors) alone."""

    @abc.abstractmethod
    def decode(self, layer: str, parts: Mapping[str, np.ndarray], where: str) -> Kernel:
        """The kernel in a layer's parts."""

    def input(self, layer: str) -> Quantizer | None:
        """How the layer's inputs are quantized."""
        return None

    def input_state(self, layer: str, tensors: "QuantizedTensors") -> Mapping[str, np.ndarray]:
        """State of the quantizer of the inputs, by name."""
        return {}


class QuantizedTensors:
    """A folder's tensors; see `interop.weights.TensorSource` and the module's docstring.

    quantized: Names of the weights that have a kernel.
    """

    def __init__(self, files: SafeTensors, method: Method):
        """Finds the quantized layers.

        Raises: ValueError: Their tensors do not belong together.
        """
        self.where, self.files, self.method = files.where, files, method
        self.layers: dict[str, list[str]] = {}
        for name in files.shapes:
            for mark in method.marks:
                if name.endswith(f".{mark}"):
                    self.layers[name.removesuffix(f".{mark}")] = []
        shapes: dict[str, tuple[int, ...]] = {}
        for name, shape in files.shapes.items():
            if (owner := self._owner(name)) is not None:
                self.layers[owner].append(name[len(owner) + 1 :])
            else:
                shapes[name] = shape
        for layer in self.layers:
            shapes[layer + _MARK] = method.shape(layer, self)
        self.shapes = shapes

    @property
    def quantized(self) -> frozenset[str]:
        """Names of the weights that have a kernel."""
        return frozenset(layer + _MARK for layer in self.layers)

    def part_shape(self, layer: str, part: str, rank: int = 2) -> tuple[int, ...]:
        """The shape of a part. Raises: ValueError: It is missing, or of another rank."""
        shape = self.files.shapes.get(f"{layer}.{part}")
        if shape is None or len(shape) != rank or 0 in shape:
            raise ValueError(
                f"{self.where}: {layer}.{part} should have {rank} axes, and "
                f"{'is missing' if shape is None else f'has the shape {shape}'}."
            )
        return shape

    def raw(self, layer: str, part: str) -> np.ndarray:
        """A part of a layer, in its own type."""
        return self.files.raw(f"{layer}.{part}")

    def read(self, name: str) -> Float32[np.ndarray, "..."]:
        """A tensor as float32; a quantized weight is dequantized."""
        if name in self.quantized:
            return np.ascontiguousarray(self.kernel(name).dequantize().T)
        return self.files.read(name)

    def kernel(self, name: str) -> Kernel:
        """A quantized weight [in, out].

        Raises:
            ValueError: The layer's tensors do not belong together.
            NotImplementedError: A scheme that is not known here.
        """
        layer = name.removesuffix(_MARK)
        parts = {part: self.raw(layer, part) for part in self.layers[layer]}
        kernel = self.method.decode(layer, parts, f"{self.where}: {layer}")
        if kernel.qtensor.shape[::-1] != self.shapes[name]:
            raise ValueError(
                f"{self.where}: {layer} holds a kernel {kernel.qtensor.shape[::-1]} where its "
                f"headers say {self.shapes[name]}."
            )
        return kernel

    def input(self, name: str) -> Quantizer | None:
        """How the inputs of a quantized weight are quantized."""
        return self.method.input(name.removesuffix(_MARK))

    def input_state(self, name: str) -> Mapping[str, np.ndarray]:
        """State of that quantizer."""
        return self.method.input_state(name.removesuffix(_MARK), self)

    def drop_zero_biases(self, keep: str) -> None:
        """Forgets biases of quantized layers that are all zero: some writers give every layer one.

        keep: Full-match regex of the layers whose biases the model has.
        """
        for layer in self.layers:
            name = f"{layer}.bias"
            if re.fullmatch(keep, layer) or name not in self.shapes:
                continue
            if not self.files.read(name).any():
                del self.shapes[name]

    def _owner(self, name: str) -> str | None:
        for part in self.method.parts:
            layer = name.removesuffix(f".{part}")
            if layer != name and layer in self.layers:
                return layer
        return None


class GPTQ(Method):
    """`quant_method` "gptq"."""

    marks, parts = ("qweight",), gptq.PARTS

    def __init__(self, fields: Fields):
        """Reads the configuration. Raises: NotImplementedError: An option not known here."""
        self.bits = fields.integer("bits")
        gptq.check_bits(self.bits, fields.where)
        self.symmetric = fields.flag("sym", True)
        name = fields.text("checkpoint_format", None) or fields.text("format", "gptq")
        versions = {"gptq": 1, "gptq_v2": 2}
        if name not in versions:
            unknown = "checkpoint_format" if fields.has("checkpoint_format") else "format"
            fields.unsupported(unknown, f"known are {list(versions)}")
        self.version = versions[name]
        # Patterns with a minus only say which layers are float; the tensors say so too.
        if any(not key.startswith("-") for key in fields.inner("dynamic").values):
            fields.unsupported("dynamic", "all layers are read with one width")

    @override
    def shape(self, layer: str, tensors: QuantizedTensors) -> tuple[int, ...]:
        rows, n = tensors.part_shape(layer, "qweight")
        return n, rows * 32 // self.bits

    @override
    def decode(self, layer: str, parts: Mapping[str, np.ndarray], where: str) -> Kernel:
        options: dict[str, Any] = {"version": self.version, "symmetric": self.symmetric}
        return gptq.decode(parts, bits=self.bits, where=where, **options)


class AWQ(Method):
    """`quant_method` "awq"."""

    marks, parts = ("qweight",), awq.PARTS

    def __init__(self, fields: Fields):
        """Reads the configuration. Raises: NotImplementedError: An option not known here."""
        if fields.integer("bits", 4) != 4:
            fields.unsupported("bits", "AWQ's layout has 4")
        if fields.text("version", "gemm").lower() != "gemm":
            fields.unsupported("version", "known is 'gemm'")

    @override
    def shape(self, layer: str, tensors: QuantizedTensors) -> tuple[int, ...]:
        k, words = tensors.part_shape(layer, "qweight")
        return words * 8, k

    @override
    def decode(self, layer: str, parts: Mapping[str, np.ndarray], where: str) -> Kernel:
        return awq.decode(parts, where=where)


class BitsAndBytes(Method):
    """`quant_method` "bitsandbytes", NF4."""

    marks, parts = (bitsandbytes.STATE,), bitsandbytes.PARTS

    def __init__(self, fields: Fields):
        """Reads the configuration. Raises: NotImplementedError: An option not known here."""
        if not fields.flag("load_in_4bit", False):
            fields.unsupported("load_in_4bit", "of bitsandbytes only NF4 is read")
        if fields.text("bnb_4bit_quant_type", "fp4") != "nf4":
            fields.unsupported("bnb_4bit_quant_type", "known is 'nf4'")

    @override
    def shape(self, layer: str, tensors: QuantizedTensors) -> tuple[int, ...]:
        state = tensors.raw(layer, bitsandbytes.STATE)
        return bitsandbytes.shape_of(state, f"{tensors.where}: {layer}")

    @override
    def decode(self, layer: str, parts: Mapping[str, np.ndarray], where: str) -> Kernel:
        return bitsandbytes.decode(parts, where=where)


class BitNet(Method):
    """`quant_method` "bitnet"."""

    marks, parts = ("weight_scale",), bitnet.PARTS

    def __init__(self, fields: Fields):
        """Reads the configuration. Raises: NotImplementedError: An option not known here."""
        self.linear: Any = fields.text("linear_class", "bitlinear")
        if self.linear not in ("bitlinear", "autobitlinear"):
            fields.unsupported("linear_class", "known are 'bitlinear' and 'autobitlinear'")
        if fields.text("quantization_mode", "offline") != "offline":
            fields.unsupported("quantization_mode", "its weights are float; known is 'offline'")
        if fields.flag("use_rms_norm", False):
            fields.unsupported("use_rms_norm", "the decoder has no such norms")

    @override
    def shape(self, layer: str, tensors: QuantizedTensors) -> tuple[int, ...]:
        rows, k = tensors.part_shape(layer, "weight")
        return rows * 4, k

    @override
    def decode(self, layer: str, parts: Mapping[str, np.ndarray], where: str) -> Kernel:
        return bitnet.decode(parts, linear=self.linear, where=where)

    @override
    def input(self, layer: str) -> Quantizer | None:
        return Absmax(QuantSpec(format=INT8_NARROW, granularity=PerToken()))
