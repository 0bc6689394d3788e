"""bitsandbytes' NF4 against a reader of the page, with and without double quantization."""

import json

import numpy as np
import pytest

from lowbit_jax import formats
from lowbit_jax.interop.codecs import bitsandbytes

NF4 = np.array(formats.NF4.values, np.float32)
N, K, SIZE, NESTED = 12, 128, 64, 8


def state(**changes):
    content = {
        "quant_type": "nf4", "blocksize": SIZE, "dtype": "float16", "shape": [N, K],
    } | changes  # fmt: skip
    return np.frombuffer(json.dumps(content).encode(), np.uint8)


def tensors_of(double):
    rng = np.random.default_rng(0)
    codes = rng.integers(0, 16, N * K, dtype=np.uint8)
    tensors = {
        "weight": (codes[::2] << 4 | codes[1::2]).reshape(-1, 1),  # the even element is high
        "weight.quant_map": NF4,
        bitsandbytes.STATE: state(),
    }
    blocks = N * K // SIZE
    absmax = rng.uniform(0.01, 2, blocks).astype(np.float32)
    absmax[3] = 0
    if double:
        small = rng.integers(0, 256, blocks, dtype=np.uint8)
        table = np.sort(rng.uniform(-1, 1, 256)).astype(np.float32)
        nested = rng.uniform(0.1, 1, blocks // NESTED).astype(np.float32)
        offset = np.float32(0.8125)
        absmax = np.array(
            [table[small[i]] * nested[i // NESTED] + offset for i in range(blocks)], np.float32
        )
        tensors |= {
            "weight.absmax": small,
            "weight.nested_absmax": nested,
            "weight.nested_quant_map": table,
            bitsandbytes.STATE: state(
                nested_blocksize=NESTED, nested_offset=float(offset), nested_dtype="float32"
            ),
        }
    else:
        tensors["weight.absmax"] = absmax
    flat = np.array([NF4[c] * absmax[i // SIZE] for i, c in enumerate(codes)], np.float32)
    return tensors, flat.reshape(N, K), codes.reshape(N, K)


@pytest.mark.parametrize("double", [False, True])
def test_read_as_the_page_says(double):
    tensors, values, codes = tensors_of(double)
    kernel = bitsandbytes.decode(tensors, where="w")
    np.testing.assert_array_equal(kernel.dequantize().T, values)
    np.testing.assert_array_equal(np.asarray(kernel.qtensor.codes()).T, codes)
    assert bitsandbytes.shape_of(tensors[bitsandbytes.STATE], "w") == (N, K)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({bitsandbytes.STATE: state(quant_type="fp4")}, NotImplementedError, "known is 'nf4'"),
        ({bitsandbytes.STATE: state(blocksize=96)}, NotImplementedError, "whole blocks of 96"),
        ({bitsandbytes.STATE: state(shape=[N])}, ValueError, r"shape is \[12\]"),
        ({bitsandbytes.STATE: state(shape=[N, 2**40])}, ValueError, "not two lengths"),
        ({bitsandbytes.STATE: np.full(4, 65, np.uint8)}, ValueError, "is not JSON"),
        ({"weight.quant_map": NF4[::-1]}, NotImplementedError, "other values than NF4's"),
        ({"weight": np.zeros((5, 1), np.uint8)}, ValueError, "5 bytes do not hold 12 x 128"),
        ({"weight.absmax": np.zeros(3, np.float32)}, ValueError, r"is \(3,\), for 24 blocks"),
        ({"weight.absmax": np.zeros(24, np.uint8)}, ValueError, "nested_blocksize is missing"),
    ],
)
def test_damage_is_named(change, error, message):
    tensors, _, _ = tensors_of(False)
    with pytest.raises(error, match=f"w.*{message}"):
        bitsandbytes.decode(tensors | change, where="w")
