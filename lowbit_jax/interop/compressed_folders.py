"""`quant_method` "compressed-tensors": which layers are stored how, and what their inputs become.

`config_groups` say it: each names its targets (a class of torch, a layer, or `re:` and a pattern)
and describes weights and inputs. Only schemes whose inputs are quantized as they come are read:
their scales follow each token, but for NVFP4's global scale, which the file holds.
"""

import dataclasses
import re
from collections.abc import Mapping
from typing import Any, Final, override

import numpy as np

from lowbit_jax import formats
from lowbit_jax.interop.codecs import block_floats, compressed_tensors
from lowbit_jax.interop.codecs.parts import Kernel
from lowbit_jax.interop.fields import Fields
from lowbit_jax.interop.quantized import Method, QuantizedTensors
from lowbit_jax.quantizers import Absmax, Quantizer, StaticAbsmax
from lowbit_jax.scale_formats import E4M3, E8M0
from lowbit_jax.spec import PerToken, QuantSpec

INPUT_GLOBAL: Final = "input_global_scale"
# What NVFP4's scales and codes reach together: 448 * 6.
NVFP4_REACH: Final = np.float32(448.0 * 6.0)
_KNOWN: Final = (*compressed_tensors.FORMATS, *block_floats.FORMATS)
_LONGEST: Final = 256  # characters of a pattern
_MARKS: Final = ("weight_packed", "weight_scale")


@dataclasses.dataclass(frozen=True)
class Group:
    """One of `config_groups`."""

    targets: tuple[str, ...]
    format: str
    bits: int
    input: Quantizer | None

    def matches(self, layer: str) -> bool:
        """Whether a target names the layer, or the class of all of them."""
        return any(
            re.match(target[3:], layer) is not None
            if target.startswith("re:")
            else target in ("Linear", layer)
            for target in self.targets
        )


class CompressedTensors(Method):
    """`quant_method` "compressed-tensors"."""

    marks = _MARKS
    parts = (*compressed_tensors.PARTS, "weight_global_scale", INPUT_GLOBAL)

    def __init__(self, fields: Fields):
        """Reads the configuration.

        Raises:
            ValueError: It is not consistent.
            NotImplementedError: An option not known here.
        """
        for name in ("kv_cache_scheme", "sparsity_config", "transform_config"):
            if fields.values.get(name):
                fields.unsupported(name, "only weights and inputs of linear layers are read")
        status = fields.text("quantization_status", "compressed")
        if status not in ("compressed", "frozen"):
            fields.unsupported("quantization_status", "known is 'compressed'")
        default = fields.text("format", "")
        groups = fields.inner("config_groups")
        if not groups.values:
            raise ValueError(f"{fields.where}: config_groups is missing or empty.")
        self.where = fields.where
        self.groups = [_group(groups.inner(name), default) for name in groups.values]

    @override
    def shape(self, layer: str, tensors: QuantizedTensors) -> tuple[int, ...]:
        group = self._of(layer)
        if group.format == compressed_tensors.PACKED:
            tensors.part_shape(layer, "weight_shape", rank=1)
            shape = tensors.raw(layer, "weight_shape")
            return compressed_tensors.shape_of(shape, f"{tensors.where}: {layer}")
        if group.format in block_floats.FORMATS:
            n, half = tensors.part_shape(layer, "weight_packed")
            return n, half * 2
        return tensors.part_shape(layer, "weight")

    @override
    def decode(self, layer: str, parts: Mapping[str, np.ndarray], where: str) -> Kernel:
        group = self._of(layer)
        if group.format in block_floats.FORMATS:
            return block_floats.decode(parts, format=group.format, where=where)
        return compressed_tensors.decode(parts, format=group.format, bits=group.bits, where=where)

    @override
    def input(self, layer: str) -> Quantizer | None:
        return self._of(layer).input

    @override
    def input_state(self, layer: str, tensors: QuantizedTensors) -> Mapping[str, np.ndarray]:
        if not isinstance(self.input(layer), StaticAbsmax):
            return {}
        if INPUT_GLOBAL not in tensors.layers[layer]:
            raise ValueError(f"{tensors.where}: {layer}.{INPUT_GLOBAL} is missing.")
        divisor = tensors.raw(layer, INPUT_GLOBAL).astype(np.float32)
        if divisor.size != 1 or not np.isfinite(divisor).all() or not (divisor > 0).all():
            raise ValueError(f"{tensors.where}: {layer}.{INPUT_GLOBAL} is no number > 0.")
        return {"absmax": (NVFP4_REACH / divisor).reshape(1, 1)}

    def _of(self, layer: str) -> Group:
        for group in self.groups:
            if group.matches(layer):
                return group
        raise ValueError(f"{self.where}: {layer} is quantized, and no group of it names it.")


def _group(fields: Fields, default: str) -> Group:
    targets = fields.values.get("targets")
    if not isinstance(targets, list) or not all(isinstance(t, str) for t in targets):
        raise ValueError(f"{fields.where}: targets is not a list of names.")
    for target in targets:
        _check_pattern(target.removeprefix("re:"), fields.where)
    format = fields.text("format", default)
    if format not in _KNOWN:
        raise NotImplementedError(
            f"{fields.where}: format is {format!r}; known are {list(_KNOWN)}."
        )
    bits = fields.inner("weights").integer("num_bits")
    inputs = fields.inner("input_activations")
    if fields.has("output_activations"):
        fields.unsupported("output_activations", "outputs stay float")
    return Group(tuple(targets), format, bits, _input(inputs) if inputs.values else None)


def _check_pattern(pattern: str, where: str) -> None:
    """Refuses what is no pattern, and what could take exponential time to match."""
    if len(pattern) > _LONGEST or re.search(r"\)[*+{]", pattern):
        raise NotImplementedError(
            f"{where}: the target {pattern[:40]!r} repeats a group or is longer than {_LONGEST}."
        )
    try:
        re.compile(pattern)
    except (re.error, RecursionError, OverflowError) as error:
        raise ValueError(f"{where}: the target {pattern!r} is no pattern ({error}).") from None


def _input(fields: Fields) -> Quantizer:
    bits, kind = fields.integer("num_bits"), fields.text("type", "int")
    strategy = fields.text("strategy", "token")
    dynamic: Any = fields.values.get("dynamic", False)
    size = fields.integer("group_size", None)
    match kind, bits, strategy, size, dynamic:
        case "int", 4 | 8, "token", None, True if fields.flag("symmetric", True):
            return Absmax(QuantSpec(format=formats.get(f"int{bits}"), granularity=PerToken()))
        case "float", 8, "token", None, True:
            return Absmax(QuantSpec(format=formats.FP8_E4M3, granularity=PerToken()))
        case "float", 4, "tensor_group", 16, "local":
            spec = QuantSpec(format=formats.FP4_E2M1, granularity=PerToken(16), scale_format=E4M3)
            return StaticAbsmax(spec)
        case "float", 4, "group", 32, True:
            spec = QuantSpec(format=formats.FP4_E2M1, granularity=PerToken(32), scale_format=E8M0)
            return Absmax(spec)
    raise NotImplementedError(
        f"{fields.where}: inputs {kind}{bits}, strategy {strategy!r}, group_size {size}, dynamic "
        f"{dynamic!r}; known are symmetric int4, int8 and float8 per token, NVFP4's and MXFP4's."
    )
