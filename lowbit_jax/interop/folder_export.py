"""Writes a decoder as a folder of transformers: config.json, model.safetensors, tokenizer.json."""

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Final

import numpy as np

from lowbit_jax.data.tokenizers import Tokenizer
from lowbit_jax.interop.architectures import huggingface_config
from lowbit_jax.interop.codecs.parts import DoesNotFit, Kernel, scale_of
from lowbit_jax.interop.hf_tokenizers import write_tokenizer
from lowbit_jax.interop.huggingface import CONFIG, NAMES
from lowbit_jax.interop.leaves import Leaf, leaves_of
from lowbit_jax.interop.schemes import (
    AWQTarget,
    BitNetTarget,
    CompressedTarget,
    GPTQTarget,
    Target,
)
from lowbit_jax.interop.table import Written, as_float16, require_strict, rounded_scales, whole
from lowbit_jax.interop.weights import layer_name
from lowbit_jax.interop.writers import write_safetensors
from lowbit_jax.models import Decoder

TARGETS: Final[dict[str, Callable[[], Target]]] = {
    "gptq": lambda: GPTQTarget(1),
    "gptq_v2": lambda: GPTQTarget(2),
    "awq": AWQTarget,
    "compressed-tensors": CompressedTarget,
    "bitnet": BitNetTarget,
}
DENSE: Final = "safetensors"
_SUFFIX: Final = ".weight"


def export_folder(
    model: Decoder, path: Path, format: str, *, tokenizer: Tokenizer | None, strict: bool
) -> list[Written]:
    """Writes the folder; `format` is one of `TARGETS`, or `DENSE`: float32, all dequantized.

    Raises:
        ValueError: `path` is there already; strict, and a tensor would lose its codes; a value that
            float16 does not have.
        NotImplementedError: The format has no such scheme, or no family computes what the model
            does.
    """
    target = TARGETS[format]() if format in TARGETS else None
    content = huggingface_config(model.config, "float16" if target is not None else "float32")
    leaves, rows = leaves_of(model), list[Written]()
    with whole(path) as partial:
        partial.mkdir()
        weights = partial / "model.safetensors"
        write_safetensors(weights, _tensors(leaves, target, rows, format, strict))
        if target is not None:
            floats = [row for row in rows if row.now == "float16" and row.path.endswith("kernel")]
            options = target.config(sorted(row.name.removesuffix(_SUFFIX) for row in floats))
            if options is None:
                raise ValueError(
                    f"export to {format}: no layer of this model can be kept quantized: "
                    f"{next((row.why for row in rows if row.why), 'it is float')}. "
                    f"{DENSE!r} and 'gguf' hold float models."
                )
            content["quantization_config"] = options
        content |= write_tokenizer(partial, tokenizer)
        (partial / CONFIG).write_text(json.dumps(content, indent=2) + "\n")
    return rows


def _tensors(
    leaves: list[Leaf], target: Target | None, rows: list[Written], format: str, strict: bool
) -> Iterator[tuple[str, np.ndarray]]:
    """All tensors, one leaf at a time; notes in `rows` what became of it."""
    for leaf in leaves:
        name = layer_name(NAMES, leaf.path)
        reason = ""
        if leaf.spec is not None and target is not None:
            reason = _misfit(leaf, target)
            if not reason:
                try:
                    yield from _encoded(leaf, name, target, rows)
                    continue
                except DoesNotFit as misfit:
                    reason = str(misfit).removeprefix(f"{leaf.path}: ")
        was = "float" if leaf.spec is None else leaf.spec.describe()
        dtype = "float32" if target is None else "float16"
        if leaf.spec is not None and target is None:
            reason = f"{DENSE} is dequantized"
        row = Written(leaf.path, name, was, dtype, reason)
        if strict:
            require_strict([row] if target is not None else [], format)
        rows.append(row)
        values = leaf.value()
        values = values if dtype == "float32" else as_float16(values, leaf.path)
        yield name, values.T if leaf.path.endswith("kernel") else values


def _encoded(
    leaf: Leaf, name: str, target: Target, rows: list[Written]
) -> Iterator[tuple[str, np.ndarray]]:
    layer, kernel = name.removesuffix(_SUFFIX), leaf.kernel()
    parts = target.encode(layer, leaf, kernel)
    assert leaf.spec is not None
    remark = ""
    if any(part.dtype == np.float16 for part in parts.values()):
        scale = scale_of(kernel.qtensor)
        remark = rounded_scales(scale, scale.astype(np.float32).astype(np.float16))
    if isinstance(target, GPTQTarget) and target.version == 1:
        remark = ", ".join(filter(None, [remark, _wrapped(kernel)]))
    rows.append(Written(leaf.path, name, leaf.spec.describe(), f"{target.name} codes", remark))
    for part, tensor in parts.items():
        yield f"{layer}.{part}", tensor


def _wrapped(kernel: Kernel) -> str:
    zeros = kernel.qtensor.zero_point
    count = 0 if zeros is None else int((np.asarray(zeros) == 0).sum())
    return f"{count} zero points of 0 wrap in version 1; gptq_v2 holds them" if count else ""


def _misfit(leaf: Leaf, target: Target) -> str:
    """Why a quantized leaf cannot stay so, whatever its scheme; "" if it can."""
    if leaf.path.endswith("embedding"):
        return f"{target.name} keeps linear layers, and this is the embedding"
    if leaf.path.startswith("head/") and not target.linear_head:
        return f"{target.name} leaves the head float"
    return ""
