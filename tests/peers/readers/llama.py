"""What llama.cpp makes of GGUF files: tokens of a text, a greedy continuation, logits."""

import ctypes
import json
import sys

import llama_cpp
import numpy as np

job, out = json.loads(sys.argv[1]), sys.argv[2]
found = {}
for source, kind, path in job.get("quantize", []):
    options = llama_cpp.llama_model_quantize_default_params()
    options.ftype, options.nthread = kind, 1
    done = llama_cpp.llama_model_quantize(source.encode(), path.encode(), ctypes.byref(options))
    assert done == 0, path
for name, path in job["files"].items():
    # Caches in float32: what is compared is the file.
    options = {"n_ctx": 256, "logits_all": True, "verbose": False, "n_threads": 1}
    model = llama_cpp.Llama(path, type_k=0, type_v=0, **options)
    tokens = job.get("tokens") or model.tokenize(job["text"].encode())
    found[f"{name}.tokens"] = np.array(tokens)
    model.eval(tokens)
    made = []
    for _ in range(job.get("count", 0)):
        made.append(int(np.argmax(model.scores[model.n_tokens - 1])))
        model.eval(made[-1:])
    found[f"{name}.made"] = np.array(made)
    found[f"{name}.text"] = np.array(model.detokenize(made).decode(errors="replace"))
    found[f"{name}.logits"] = np.array(model.scores[: model.n_tokens])
np.savez(out, **found)
