"""The weights of a GPTQ or AWQ folder as GPTQModel dequantizes them, and its logits."""

import json
import sys

import numpy as np
import torch
from gptqmodel import BACKEND, GPTQModel
from gptqmodel.quantization.awq.utils.packing_utils import dequantize_gemm

job, out = json.loads(sys.argv[1]), sys.argv[2]
backend = getattr(BACKEND, job["backend"])
options = {"backend": backend, "device": "cpu", "dtype": torch.float16}
model = GPTQModel.load(job["folder"], **options).model
found = {}
for name, module in model.named_modules():
    if not hasattr(module, "qweight"):
        continue
    if backend is BACKEND.GPTQ_TORCH:
        weight = module.dequantize_weight()
    else:
        parts = (module.qweight, module.qzeros, module.scales, module.bits, module.group_size)
        weight = dequantize_gemm(*parts)
    found[f"{name}.weight"] = weight.T.float().numpy()
with torch.no_grad():
    found["logits"] = model(torch.tensor(job["tokens"])).logits.float().numpy()
np.savez(out, **found)
