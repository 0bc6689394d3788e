"""Formats of Hugging Face folders as targets: how a layer is encoded, what the configuration says.

A target is asked about each kernel; from what it encoded it makes `quantization_config`. Where the
format has one setting for all layers, those that differ are refused by name.
"""

import abc
from collections.abc import Mapping
from typing import Any, Final, override

import numpy as np

from lowbit_jax import formats
from lowbit_jax.interop.codecs import awq, bitnet, block_floats, compressed_tensors, gptq
from lowbit_jax.interop.codecs.parts import Kernel, group_size, is_signed_grid
from lowbit_jax.interop.compressed_folders import INPUT_GLOBAL, NVFP4_REACH
from lowbit_jax.interop.leaves import Leaf
from lowbit_jax.quantizers import Absmax, Quantizer, StaticAbsmax
from lowbit_jax.scale_formats import E4M3, E8M0
from lowbit_jax.spec import PerTensor, PerToken, QuantSpec

Config = dict[str, Any] | None


class Target(abc.ABC):
    """A format of a folder.

    Attributes:
        name: As on the command line.
        linear_head: Whether a head can be quantized.
    """

    name: str
    linear_head = False

    @abc.abstractmethod
    def encode(self, layer: str, leaf: Leaf, kernel: Kernel) -> Mapping[str, np.ndarray]:
        """The parts of one layer.

        Raises:
            NotImplementedError: The format has no such scheme; `DoesNotFit`: not at this shape.
        """

    @abc.abstractmethod
    def config(self, skipped: list[str]) -> Config:
        """`quantization_config`, once all layers are encoded; `skipped` are linear and float."""


def _need_float_inputs(leaf: Leaf, name: str) -> None:
    scheme = leaf.scheme
    if scheme is not None and (scheme.input is not None or scheme.output is not None):
        raise NotImplementedError(
            f"{leaf.path}: {name} quantizes weights alone, and this layer is {scheme.describe()}. "
            "The nearest that fits: compressed-tensors, or a scheme such as w4a16_g128."
        )


class _Uniform(Target):
    """One setting for all layers."""

    def __init__(self) -> None:
        self.setting: dict[str, Any] | None = None
        self.symmetric = True
        self.ordered = True

    def _note(self, leaf: Leaf, kernel: Kernel) -> None:
        q = kernel.qtensor
        _need_float_inputs(leaf, self.name)
        self.symmetric &= is_signed_grid(q.spec.format)
        self.ordered &= kernel.input_permutation is None
        size = group_size(q)
        whole = getattr(q.spec.granularity, "k", None) is None
        setting = {"bits": q.spec.bits, "group_size": -1 if whole else size}
        if self.setting not in (None, setting):
            raise NotImplementedError(
                f"{leaf.path}: {self.name} has one width and one group size for all layers, and "
                f"this one has {setting} where others have {self.setting}. The nearest that fits: "
                "compressed-tensors."
            )
        self.setting = setting


class GPTQTarget(_Uniform):
    """GPTQ, version 1 or 2."""

    linear_head = True

    def __init__(self, version: int):
        super().__init__()
        self.version = version
        self.name = "gptq" if version == 1 else "gptq_v2"
        self.head = False

    @override
    def encode(self, layer: str, leaf: Leaf, kernel: Kernel) -> Mapping[str, np.ndarray]:
        parts = gptq.encode(kernel, version=self.version, where=leaf.path)
        self._note(leaf, kernel)
        self.head |= layer == "lm_head"
        return parts

    @override
    def config(self, skipped: list[str]) -> Config:
        if self.setting is None:
            return None
        config = {
            "quant_method": "gptq",
            **self.setting,
            "sym": self.symmetric,
            "desc_act": not self.ordered,
            "lm_head": self.head,
            "checkpoint_format": self.name,
            "pack_dtype": "int32",
        }
        left = [layer for layer in skipped if layer != "lm_head"]
        if left:
            config["dynamic"] = {f"-:^{layer.replace('.', chr(92) + '.')}$": {} for layer in left}
        return config


class AWQTarget(_Uniform):
    """AWQ's GEMM layout."""

    name = "awq"

    @override
    def encode(self, layer: str, leaf: Leaf, kernel: Kernel) -> Mapping[str, np.ndarray]:
        parts = awq.encode(kernel, where=leaf.path)
        self._note(leaf, kernel)
        return parts

    @override
    def config(self, skipped: list[str]) -> Config:
        if self.setting is None:
            return None
        left = [layer for layer in skipped if layer != "lm_head"]
        return {
            "quant_method": "awq",
            **self.setting,
            "zero_point": True,
            "version": "gemm",
            "modules_to_not_convert": left or None,
        }


class BitNetTarget(Target):
    """transformers' BitLinear, whose scale multiplies ("autobitlinear")."""

    name = "bitnet"

    def __init__(self) -> None:
        self.any = False

    @override
    def encode(self, layer: str, leaf: Leaf, kernel: Kernel) -> Mapping[str, np.ndarray]:
        parts = bitnet.encode(kernel, linear="autobitlinear", where=leaf.path)
        quantizer = leaf.scheme.input if leaf.scheme is not None else None
        wanted = QuantSpec(format=formats.INT8_NARROW, granularity=PerToken())
        if not isinstance(quantizer, Absmax) or quantizer != Absmax(wanted):
            raise NotImplementedError(
                f"{leaf.path}: Hugging Face's BitNet rounds inputs to int8 per token, and this "
                "layer does not. The nearest that fits: w1_58a8; or GGUF's TQ2_0 for w1_58a16."
            )
        self.any = True
        return parts

    @override
    def config(self, skipped: list[str]) -> Config:
        if not self.any:
            return None
        return {
            "quant_method": "bitnet",
            "linear_class": "autobitlinear",
            "quantization_mode": "offline",
            "modules_to_not_convert": skipped or None,
        }


class CompressedTarget(Target):
    """compressed-tensors: each layer by the format that holds it, a group for each scheme."""

    name = "compressed-tensors"
    linear_head = True

    def __init__(self) -> None:
        self.groups: dict[str, tuple[dict[str, Any], list[str]]] = {}

    @override
    def encode(self, layer: str, leaf: Leaf, kernel: Kernel) -> Mapping[str, np.ndarray]:
        spec, scheme = kernel.qtensor.spec, leaf.scheme
        quantizer = scheme.input if scheme is not None else None
        if scheme is not None and scheme.output is not None:
            raise NotImplementedError(f"{leaf.path}: outputs are quantized; leave them float.")
        format = _format_for(spec, quantizer)
        parts: dict[str, np.ndarray]
        if format in block_floats.FORMATS:
            parts = block_floats.encode(kernel, format=format, where=leaf.path)
        else:
            scales: Any = {"scale_format": spec.scale_format, "where": leaf.path}
            parts = compressed_tensors.encode(kernel, format=format, **scales)
        if isinstance(quantizer, StaticAbsmax):
            absmax = np.asarray(leaf.input_state["absmax"], np.float32).reshape(1)
            parts[INPUT_GLOBAL] = NVFP4_REACH / absmax
        group = {
            "weights": _weights(kernel),
            "input_activations": _inputs(quantizer, leaf.path),
            "output_activations": None,
            "format": format,
        }
        self.groups.setdefault(repr(group), (group, []))[1].append(layer)
        return parts

    @override
    def config(self, skipped: list[str]) -> Config:
        if not self.groups:
            return None
        alone = len(self.groups) == 1
        groups = {
            f"group_{i}": {"targets": ["Linear"] if alone else layers, **group}
            for i, (group, layers) in enumerate(self.groups.values())
        }
        kinds = sorted({group["format"] for group in groups.values()})
        return {
            "quant_method": "compressed-tensors",
            "format": kinds[0] if len(kinds) == 1 else "mixed-precision",
            "quantization_status": "compressed",
            "config_groups": groups,
            "ignore": skipped,
            "kv_cache_scheme": None,
            "global_compression_ratio": None,
        }


_LEVELS: Final = {
    E4M3: (block_floats.NVFP4, 16),
    E8M0: (block_floats.MXFP4, 32),
}


def _format_for(spec: QuantSpec, inputs: Quantizer | None) -> str:
    if spec.scale_format in _LEVELS:
        return _LEVELS[spec.scale_format][0]
    if spec.format is formats.FP8_E4M3:
        return compressed_tensors.FLOAT
    eight = spec.bits == 8 and inputs is not None and getattr(spec.granularity, "k", 1) is None
    return compressed_tensors.INTEGER if eight else compressed_tensors.PACKED


def _weights(kernel: Kernel) -> dict[str, Any]:
    q = kernel.qtensor
    k, n = q.spec.granularity.k, getattr(q.spec.granularity, "n", None)
    strategy, size = "group", k
    if q.spec.granularity == PerTensor():
        strategy = "tensor"
    elif k is None:
        strategy = "channel"
    elif q.spec.scale_format is E4M3:
        strategy = "tensor_group"
    elif n != 1:
        strategy, size = "block", None
    integer = q.spec.format.name.startswith(("int", "uint", "ternary"))
    return {
        "num_bits": q.spec.bits,
        "type": "int" if integer else "float",
        # The library asks for zero points of asymmetric ones, and makes up those it misses.
        "symmetric": is_signed_grid(q.spec.format) or not integer,
        "strategy": strategy,
        "group_size": size,
        "block_structure": [n, k] if strategy == "block" else None,
        "dynamic": False,
        "actorder": None if kernel.input_permutation is None else "group",
    }


def _inputs(quantizer: Quantizer | None, where: str) -> dict[str, Any] | None:
    if quantizer is None:
        return None
    spec = quantizer.spec
    common = {"num_bits": spec.bits, "symmetric": True, "dynamic": True}
    per_token = spec.granularity == PerToken()
    if isinstance(quantizer, Absmax) and is_signed_grid(spec.format) and per_token:
        return common | {"type": "int", "strategy": "token"}
    if isinstance(quantizer, Absmax) and spec.format is formats.FP8_E4M3 and per_token:
        return common | {"type": "float", "strategy": "token"}
    if spec.format is formats.FP4_E2M1 and spec.scale_format in _LEVELS:
        size = _LEVELS[spec.scale_format][1]
        if isinstance(quantizer, StaticAbsmax) and size == 16:
            change = {"strategy": "tensor_group", "dynamic": "local"}
            return common | {"type": "float", "group_size": size} | change
        if isinstance(quantizer, Absmax) and size == 32:
            return common | {"type": "float", "strategy": "group", "group_size": size}
    raise NotImplementedError(
        f"{where}: compressed-tensors has no inputs {spec.describe()}. The nearest that fits: "
        "w8a8, nvfp4 or mxfp4."
    )
