"""Writes a decoder as a GGUF file, with its tokenizer.

A kernel with codes is written as the smallest type that holds its values: the same integers, scales
in float16. One that no type holds at its shape is written dequantized in float16. Float tensors are
float16, those of one axis float32, as ggml asks; a `type` quantizes the float matrices on the way,
with ggml's rounding.
"""

import functools
from pathlib import Path
from typing import Any, Final

import numpy as np

from lowbit_jax.data.tokenizers import Tokenizer
from lowbit_jax.interop.architectures import gguf_metadata, linear_factor
from lowbit_jax.interop.codecs import ggml_blocks
from lowbit_jax.interop.codecs.parts import DoesNotFit, scale_of
from lowbit_jax.interop.ggml_quantize import QUANTIZED, quantize_rows
from lowbit_jax.interop.gguf_models import FAMILIES, NAMES, ROPE_FACTORS
from lowbit_jax.interop.gguf_tokenizer_export import tokenizer_metadata
from lowbit_jax.interop.leaves import Leaf, leaves_of
from lowbit_jax.interop.packed import reordered
from lowbit_jax.interop.table import Written, as_float16, require_strict, rounded_scales, whole
from lowbit_jax.interop.weights import layer_name
from lowbit_jax.interop.writers import GGUFOutput, write_gguf
from lowbit_jax.models import Decoder, DecoderConfig

F16: Final = "F16"
TYPES: Final = (F16, *QUANTIZED)
TERNARY: Final = ("TQ2_0", "TQ1_0")
_FILE_TYPES: Final = {"F16": 1, "Q4_0": 2, "Q8_0": 7, "TQ1_0": 36, "TQ2_0": 37, "MXFP4": 38}


def export_gguf(
    model: Decoder,
    path: Path,
    *,
    tokenizer: Tokenizer | None,
    strict: bool,
    type: str = F16,
    ternary: str = "TQ2_0",
) -> list[Written]:
    """Writes the file.

    Args:
        model: Float, packed, or quantized and not yet packed.
        path: Of the file.
        tokenizer: Goes into the file.
        strict: Refuse where a tensor would lose its codes.
        type: Of float matrices, one of `TYPES`: all but float16 quantize them here; rows that are
            no whole blocks of it stay float16.
        ternary: The type of ternary kernels: TQ1_0 is smaller, TQ2_0 faster.
    Raises:
        ValueError: As `folder_export.export_folder`.
        NotImplementedError: GGUF has no such scheme, or no family computes what the model does.
    """
    metadata = gguf_metadata(model.config)
    interleaved = FAMILIES[metadata["general.architecture"]].interleaved
    rows, outputs = list[Written](), list[GGUFOutput]()
    for leaf in leaves_of(model):
        order = _rows_of(leaf.path, model.config) if interleaved else None
        row, output = _planned(leaf, order, type, ternary)
        rows.append(row)
        outputs.append(output)
    if strict:
        require_strict(rows, "gguf")
    if model.config.rope_factors is not None and linear_factor(model.config) is None:
        factors = np.array(model.config.rope_factors, np.float32)
        outputs.append(GGUFOutput(ROPE_FACTORS, "F32", factors.shape, lambda: factors))
    metadata |= {
        "general.name": path.stem,
        "general.file_type": _file_type(outputs),
        "general.quantization_version": 2,
    }
    if tokenizer is not None:
        metadata |= tokenizer_metadata(tokenizer)
    with whole(path) as partial:
        write_gguf(partial, metadata, outputs)
    return rows


def _planned(
    leaf: Leaf, order: np.ndarray | None, type: str, ternary: str
) -> tuple[Written, GGUFOutput]:
    """What a leaf becomes; its bytes are made when they are written."""
    name = layer_name(NAMES, leaf.path)
    shape = leaf.shape[::-1] if leaf.path.endswith("kernel") else leaf.shape
    reason = ""
    if leaf.spec is not None:
        try:
            kind, remark = _fitting(leaf, ternary)
        except DoesNotFit as misfit:
            reason = str(misfit).removeprefix(f"{leaf.path}: ")
        else:
            data = functools.partial(_packed, leaf, order, kind)
            row = Written(leaf.path, name, leaf.spec.describe(), f"{kind} codes", remark)
            return row, GGUFOutput(name, kind, shape, data)
    was = "float" if leaf.spec is None else leaf.spec.describe()
    kind = "F32" if len(shape) == 1 else F16
    if leaf.spec is None and kind == F16 and type != F16:
        elements = ggml_blocks.BLOCK_TYPES[type].elements
        if shape[-1] % elements:
            reason = f"rows of {shape[-1]} are no whole blocks of {elements}"
        else:
            kind = type
    now = {"F32": "float32", F16: "float16"}.get(kind, f"{kind}, quantized by ggml's rounding")
    data = functools.partial(_floats, leaf, order, kind)
    return Written(leaf.path, name, was, now, reason), GGUFOutput(name, kind, shape, data)


def _fitting(leaf: Leaf, ternary: str) -> tuple[str, str]:
    """The type for a kernel, and a remark for the table. Raises: as `ggml_blocks.encode`."""
    assert leaf.spec is not None
    kernel = leaf.kernel()
    if kernel.input_permutation is not None:
        ggml_blocks.encode(kernel, ggml_blocks.types_for(leaf.spec)[0], where=leaf.path)
    other = [kind for kind in TERNARY if kind != ternary]
    types = [kind for kind in ggml_blocks.types_for(leaf.spec) if kind not in other]
    fits = [kind for kind in types if ggml_blocks.fits(kernel, kind)]
    if not fits:
        raise DoesNotFit(ggml_blocks.why_not(kernel, types[-1]))
    remarks = []
    if leaf.spec.scale_format.name in ("float32", "bfloat16"):
        scale = scale_of(kernel.qtensor).astype(np.float32)
        with np.errstate(over="ignore"):
            remarks.append(rounded_scales(scale, scale.astype(np.float16)))
    if leaf.scheme is not None and leaf.scheme.input is not None:
        remarks.append("inputs are the program's own")
    return fits[0], ", ".join(filter(None, remarks))


def _packed(leaf: Leaf, order: np.ndarray | None, kind: str) -> np.ndarray:
    return ggml_blocks.encode(reordered(leaf.kernel(), order), kind, where=leaf.path)


def _floats(leaf: Leaf, order: np.ndarray | None, kind: str) -> np.ndarray:
    values = leaf.value()
    values = values.T if leaf.path.endswith("kernel") else values
    values = values if order is None else values[order]
    if kind == "F32":
        return values.astype("<f4")
    if kind == F16:
        return as_float16(values, leaf.path).astype("<f2")
    return quantize_rows(np.ascontiguousarray(values), kind, where=leaf.path)


def _rows_of(path: str, config: DecoderConfig) -> np.ndarray | None:
    """For each row of the file our output: pairs half a head apart come side by side."""
    heads = {"query": config.heads, "key": config.kv_heads}
    part = path.split("/")[-2] if path.startswith("layers/") else ""
    if part not in heads:
        return None
    rows = np.arange(heads[part] * config.head_size, dtype=np.int32)
    return rows.reshape(heads[part], 2, -1).swapaxes(1, 2).reshape(-1)


def _file_type(outputs: list[GGUFOutput]) -> int:
    """llama.cpp's number for what most matrices are."""
    kinds: list[Any] = [output.type for output in outputs if len(output.shape) > 1]
    return _FILE_TYPES[max(set(kinds), key=kinds.count)]
