"""Float rows to GGUF's blocks with ggml's own rounding, for files that are quantized on export.

Not our quantizers: Q4_0's scale takes the sign of the largest element so that it becomes -8, and is
not the least-squares one; ternary types take the largest magnitude, so that a row that is ternary
already keeps its values.

| type | d | q |
|---|---|---|
| Q4_0 | element of largest magnitude, with its sign, / -8 | min(15, floor(x / d + 8.5)) |
| Q8_0 | largest magnitude / 127 | nearest, ties away from 0 |
| TQ1_0, TQ2_0 | largest magnitude | the same |

`x / d` is x times the float32 reciprocal of d before d is rounded to float16; 0 where d is 0.
"""

import numpy as np
from jaxtyping import Float32, UInt8

from lowbit_jax.interop.codecs.ggml_blocks import BLOCK_TYPES, join

QUANTIZED = ("Q4_0", "Q8_0", "TQ1_0", "TQ2_0")


def quantize_rows(
    x: Float32[np.ndarray, "rows k"], type: str, *, where: str
) -> UInt8[np.ndarray, " bytes"]:
    """The bytes of a tensor of `type`, one of `QUANTIZED`.

    Raises:
        ValueError: Values that are not finite or too large for float16, or rows that are no whole
            blocks.
    """
    kind = BLOCK_TYPES[type]
    if x.shape[1] % kind.elements:
        raise ValueError(
            f"{where}: rows of {x.shape[1]} are no whole blocks of {kind.elements}, of which "
            f"{type} is made."
        )
    blocks = np.ascontiguousarray(x, np.float32).reshape(-1, kind.elements)
    magnitude = np.abs(blocks)
    largest = magnitude.max(axis=1, keepdims=True)
    if type == "Q4_0":
        at = magnitude.argmax(axis=1, keepdims=True)
        d = np.take_along_axis(blocks, at, axis=1) * np.float32(-1 / 8)
    elif type == "Q8_0":
        d = largest / np.float32(127)
    else:
        d = largest
    if not np.isfinite(d).all() or (np.abs(d) > np.finfo(np.float16).max).any():
        raise ValueError(f"{where}: values are NaN, infinite, or beyond what float16 scales reach.")
    # Of subnormal numbers the reciprocal may be infinite; float16 keeps them as 0 anyway.
    normal = np.abs(d) >= np.finfo(np.float32).tiny
    v = blocks * np.divide(np.float32(1), d, out=np.zeros_like(d), where=normal)
    if type == "Q4_0":
        codes = np.minimum(np.floor(v + np.float32(8.5)), 15).astype(np.uint8)
    else:
        whole = np.floor(np.abs(v))
        # Adding a half to the magnitude itself would round the largest number below it up.
        rounded = np.sign(v) * (whole + np.floor(2 * (np.abs(v) - whole)))
        codes = (rounded + (128 if type == "Q8_0" else 1)).astype(np.uint8)
    return join(d.reshape(-1), codes, kind)
