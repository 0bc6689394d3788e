"""Logits of a folder as transformers computes them, and weights of its BitNet layers."""

import json
import sys

import numpy as np
import torch
from transformers import AutoModelForCausalLM

job, out = json.loads(sys.argv[1]), sys.argv[2]
dtype = getattr(torch, job["dtype"])
model = AutoModelForCausalLM.from_pretrained(job["folder"], dtype=dtype).eval()
found = {}
for name, module in model.named_modules():
    if type(module).__name__ == "AutoBitLinear":
        weight = module.weight.float() * module.weight_scale.float()
        found[f"{name}.weight"] = weight.detach().numpy()
with torch.no_grad():
    found["logits"] = model(torch.tensor(job["tokens"])).logits.float().numpy()
np.savez(out, **found)
