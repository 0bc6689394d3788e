"""Which reader a folder's `quantization_config` asks for."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any, Final, Literal

from lowbit_jax.interop.compressed_folders import CompressedTensors
from lowbit_jax.interop.fields import Fields
from lowbit_jax.interop.quantized import (
    AWQ,
    GPTQ,
    BitNet,
    BitsAndBytes,
    Method,
    QuantizedTensors,
)
from lowbit_jax.interop.safetensors_files import SafeTensors

Weights = Literal["float", "packed"]
"""What quantized tensors become: dequantized float32, or QTensors in packed layers."""

METHODS: Final[dict[str, Callable[[Fields], Method]]] = {
    "gptq": GPTQ,
    "awq": AWQ,
    "compressed-tensors": CompressedTensors,
    "bitsandbytes": BitsAndBytes,
    "bitnet": BitNet,
}
_OLD: Final = "quantize_config.json"  # GPTQ's own file, before transformers knew of it


def open_tensors(folder: Path, fields: Fields) -> SafeTensors | QuantizedTensors:
    """The tensors of a folder, whose config.json `fields` are.

    Raises:
        ValueError: Files are damaged, or do not belong together.
        NotImplementedError: A method, or an option of one, that is not known here.
    """
    files = SafeTensors(folder)
    if fields.has("quantization_config"):
        options = fields.inner("quantization_config")
    elif (folder / _OLD).is_file():
        options = Fields({"quant_method": "gptq"} | _read(folder / _OLD), str(folder / _OLD))
    else:
        return files
    name = options.text("quant_method")
    if name not in METHODS:
        options.unsupported("quant_method", f"known are {list(METHODS)}")
    return QuantizedTensors(files, METHODS[name](options))


def _read(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_bytes())
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path}: is not JSON ({error}).") from None
    if not isinstance(content, dict):
        raise ValueError(f"{path}: is not a JSON object.")
    return content
