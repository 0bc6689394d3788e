"""One door for all exports: `export_model(model, path, format)`."""

import difflib
from pathlib import Path
from typing import Final

from flax import nnx

from lowbit_jax.data.tokenizers import Tokenizer
from lowbit_jax.interop import folder_export, gguf_export
from lowbit_jax.interop.table import Written
from lowbit_jax.models import Decoder

# Of GGUF: what quantizes float matrices, and the type of ternary kernels.
_GGUF: Final = {
    "gguf": {},
    "gguf-tq1_0": {"type": "TQ1_0", "ternary": "TQ1_0"},
    **{f"gguf-{kind.lower()}": {"type": kind} for kind in ("Q4_0", "Q8_0", "TQ2_0")},
}
FORMATS: Final = (*folder_export.TARGETS, folder_export.DENSE, *_GGUF)


def export_model(
    model: nnx.Module,
    path: str | Path,
    format: str,
    *,
    tokenizer: Tokenizer | None = None,
    strict: bool = False,
) -> list[Written]:
    """Writes a decoder as another program's file or folder; codes are kept, none is rounded again.

    Args:
        model: Float, packed, or quantized and not yet packed (which is packed first).
        path: Of the folder, or of the GGUF file; not there yet.
        format: "gptq", "gptq_v2", "awq", "compressed-tensors", "bitnet" (folders); "safetensors" (a
            folder, dequantized to float32); "gguf" (float matrices in float16), "gguf-q4_0",
            "gguf-q8_0", "gguf-tq1_0", "gguf-tq2_0" (float matrices quantized as ggml does).
        tokenizer: Written with it.
        strict: Refuse, instead of writing a tensor dequantized that the format cannot hold.
    Returns: What became of each tensor; `table_of` shows it.
    Raises:
        ValueError: An unknown format; `path` is there already; strict, and a tensor would lose its
            codes; a value that float16 does not have.
        NotImplementedError: A scheme that the format cannot hold at all (with the nearest that
            fits), or a model that no family of the format computes.
    """
    if format not in FORMATS:
        near = difflib.get_close_matches(format, FORMATS, n=3, cutoff=0.3) or list(FORMATS)
        raise ValueError(f"export: no format is named {format!r}. Nearest: {near}.")
    if not isinstance(model, Decoder):
        raise NotImplementedError(
            f"export: the formats of other programs hold decoders, and this is a "
            f"{type(model).__name__}."
        )
    path = Path(path).expanduser()
    if format in _GGUF:
        options = _GGUF[format]
        return gguf_export.export_gguf(model, path, tokenizer=tokenizer, strict=strict, **options)
    return folder_export.export_folder(model, path, format, tokenizer=tokenizer, strict=strict)
