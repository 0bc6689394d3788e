"""Writes small random models of several families with transformers, and their logits."""

import json
import sys
from pathlib import Path

import numpy as np
import torch
import transformers

job, out = json.loads(sys.argv[1]), sys.argv[2]
found = {}
for name, (kind, options) in job["families"].items():
    torch.manual_seed(0)
    kind_of_config = f"{kind}TextConfig" if kind == "Gemma3" else f"{kind}Config"
    config = getattr(transformers, kind_of_config)(**options)
    config._attn_implementation = "eager"  # softcaps and windows as the paper has them
    model = getattr(transformers, f"{kind}ForCausalLM")(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            # Norms and biases start as ones and zeros, which would hide a mix-up.
            parameter.add_(0.1 * torch.randn_like(parameter))
        model.save_pretrained(Path(job["folder"]) / name)
        found[name] = model(torch.tensor(job["tokens"])).logits.float().numpy()
np.savez(out, **found)
