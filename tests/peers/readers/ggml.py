"""ggml's own C functions on blocks: values of bytes, and bytes of values."""

import ctypes
import json
import sys
from pathlib import Path

import llama_cpp
import numpy as np

job, out = json.loads(sys.argv[1]), sys.argv[2]
library = ctypes.CDLL(str(Path(llama_cpp.__file__).parent / "lib" / "libggml-base.so"))
found = {}
with np.load(job["file"]) as given:
    for kind, blocks in given.items():
        if kind.startswith("values "):  # rows of float32, quantized by the reference
            kind, values = kind.removeprefix("values "), np.ascontiguousarray(blocks, np.float32)
            raw = np.zeros(job["bytes"][kind], np.uint8)
            call = getattr(library, f"quantize_row_{kind.lower()}_ref")
            call(values.ctypes.data_as(ctypes.c_void_p), raw.ctypes.data_as(ctypes.c_void_p),
                 ctypes.c_int64(values.size))  # fmt: skip
            found[f"bytes {kind}"] = raw
        else:
            values = np.zeros(job["sizes"][kind], np.float32)
            call = getattr(library, f"dequantize_row_{kind.lower()}")
            call(blocks.ctypes.data_as(ctypes.c_void_p), values.ctypes.data_as(ctypes.c_void_p),
                 ctypes.c_int64(values.size))  # fmt: skip
            found[kind] = values
np.savez(out, **found)
