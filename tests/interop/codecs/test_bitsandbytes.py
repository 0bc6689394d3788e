"""bitsandbytes' NF4 against a reader of the page, with and without double quantization."""

import json

import numpy as np
import pytest

from lowbit_jax import formats
from lowbit_jax.interop.codecs import bitsandbytes
from lowbit_jax.qtensor import QTensor

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
    # The 8-bit scales are kept as such: 4 rows of 2 blocks share each of 3 nested scales.
    assert isinstance(kernel.qtensor.scale, QTensor) == double
    if double:
        small = kernel.qtensor.scale
        np.testing.assert_array_equal(
            np.asarray(small.codes()), tensors["weight.absmax"].reshape(N, -1)
        )
        np.testing.assert_array_equal(small.scale[:, 0], tensors["weight.nested_absmax"])
    assert bitsandbytes.shape_of(tensors[bitsandbytes.STATE], "w") == (N, K)


def test_nested_blocks_in_a_row_of_one_output_are_kept():
    n, k, size = 2, 512, 4
    rng = np.random.default_rng(0)
    small = rng.integers(1, 256, n * k // SIZE, dtype=np.uint8)
    table = np.array(formats.DYNAMIC8.values, np.float32)
    nested = np.linspace(0.1, 0.4, n * k // SIZE // size, dtype=np.float32)
    tensors = {
        "weight": rng.integers(0, 256, (n * k // 2, 1), dtype=np.uint8),
        "weight.absmax": small,
        "weight.nested_absmax": nested,
        "weight.nested_quant_map": table,
        bitsandbytes.STATE: state(shape=[n, k], nested_blocksize=size, nested_offset=0.5),
    }
    kernel = bitsandbytes.decode(tensors, where="w")
    level = kernel.qtensor.spec.second
    assert level.spec.format is formats.DYNAMIC8
    scale = table[small] * np.repeat(nested, size) + np.float32(0.5)
    np.testing.assert_array_equal(kernel.qtensor.range().scale, scale.reshape(n, -1).T)


@pytest.mark.parametrize(("offset", "size"), [(-9.0, NESTED), (0.5, 5)])
def test_scales_that_are_negative_or_not_in_whole_blocks_become_floats(offset, size):
    tensors, _, _ = tensors_of(True)
    tensors["weight.nested_absmax"] = np.ones(-(-N * K // SIZE // size), np.float32)
    changed = state(nested_blocksize=size, nested_offset=offset)
    kernel = bitsandbytes.decode(tensors | {bitsandbytes.STATE: changed}, where="w")
    assert kernel.qtensor.spec.second is None
    assert kernel.qtensor.scale.dtype == np.float32


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
