"""The weights of a folder as the compressed-tensors library decompresses them."""

import json
import sys
from pathlib import Path

import numpy as np
import torch
from compressed_tensors.compressors.base import BaseCompressor
from compressed_tensors.quantization import QuantizationConfig
from safetensors import safe_open

job, out = json.loads(sys.argv[1]), sys.argv[2]
folder = Path(job["folder"])
options = json.loads((folder / "config.json").read_text())["quantization_config"]
options.pop("quant_method")
(scheme,) = QuantizationConfig.model_validate(options).config_groups.values()
compressor = BaseCompressor.get_value_from_registry(scheme.format)
layers: dict[str, dict[str, torch.Tensor]] = {}
with safe_open(folder / "model.safetensors", "pt") as file:
    for name in file.keys():  # noqa: SIM118
        layer, part = name.rsplit(".", 1)
        layers.setdefault(layer, {})[part] = file.get_tensor(name)
found = {}
for layer, parts in layers.items():
    if "weight_scale" in parts:
        weight = compressor.decompress(parts, scheme)["weight"]
        # Its own type says how often it rounded; every number of it is one of float32.
        found[f"{layer}.weight"] = weight.float().numpy()
        found["dtype"] = np.array(str(weight.dtype).removeprefix("torch."))
np.savez(out, **found)
