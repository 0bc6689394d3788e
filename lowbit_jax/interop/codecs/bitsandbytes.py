"""bitsandbytes' NF4, with and without double quantization; read only.

The weight [N, K] is flattened by rows and cut in blocks of `blocksize` (64):

    weight           uint8 [N K / 2, 1]    the even element in the HIGH bits
    weight.absmax    float32 [blocks]      W = code's value * absmax of its block
    weight.quant_map float32 [16]          the values
    weight.quant_state.bitsandbytes__nf4   uint8: JSON {quant_type, blocksize, dtype, shape, ...}

Double quantization stores `absmax` in 8 bits: absmax = nested_quant_map[code] * nested_absmax[block
of nested_blocksize] + nested_offset, in float32. Its codes are kept, as a `SecondLevel`, where the
nested blocks are whole blocks of our matrix of scales: some of one output, or all of some outputs.
Where they are not, or a scale is not positive, the scales become float32.
"""

import json
from collections.abc import Mapping
from typing import Any, Final

import numpy as np

from lowbit_jax import formats
from lowbit_jax.interop.codecs.parts import (
    Kernel,
    check_finite,
    grouping,
    make_qtensor,
    require,
    take,
)
from lowbit_jax.interop.fields import Fields
from lowbit_jax.qtensor import QTensor
from lowbit_jax.scale_formats import FLOAT32
from lowbit_jax.spec import Block, QuantSpec, SecondLevel

STATE: Final = "weight.quant_state.bitsandbytes__nf4"
PARTS: Final = (
    "weight",
    "weight.absmax",
    "weight.quant_map",
    "weight.nested_absmax",
    "weight.nested_quant_map",
    STATE,
)


def shape_of(state: np.ndarray, where: str) -> tuple[int, int]:
    """The weight's shape (out, in) in a layer's state. Raises: as `decode`."""
    return _read(state, where)[1]


def decode(tensors: Mapping[str, np.ndarray], *, where: str) -> Kernel:
    """The kernel in a layer's `PARTS`.

    Raises:
        ValueError: The tensors do not belong together.
        NotImplementedError: Another type than NF4, or blocks that run over the end of a row.
    """
    fields, (n, k) = _read(take(tensors, STATE, where, 1), where)
    blocksize = fields.integer("blocksize")
    if k % blocksize:
        raise NotImplementedError(
            f"{where}: rows of {k} are no whole blocks of {blocksize}, so that blocks run over the "
            "end of a row: such scales are not supported."
        )
    weight = take(tensors, "weight", where, 2, 1)
    if n * k % 2 or weight.size != n * k // 2:
        raise ValueError(f"{where}: {weight.size} bytes do not hold {n} x {k} codes of 4 bits.")
    require(weight, "weight", where, dtype=np.uint8)
    if "weight.quant_map" in tensors:
        values = np.array(formats.NF4.values, np.float32)
        if not np.array_equal(tensors["weight.quant_map"], values):
            raise NotImplementedError(f"{where}: quant_map has other values than NF4's.")
    scale, second, offset = _scales(tensors, fields, (n, k // blocksize), where)
    codes = np.empty((n, k), np.uint8)
    flat = codes.reshape(-1)
    flat[0::2], flat[1::2] = weight.reshape(-1) >> 4, weight.reshape(-1) & 15
    spec = QuantSpec(
        format=formats.NF4, granularity=grouping(k, k // blocksize, where), second=second
    )
    return Kernel(make_qtensor(codes.T, spec, scale, scale_offset=offset, where=where))


def _scales(
    tensors: Mapping[str, np.ndarray], fields: Fields, shape: tuple[int, int], where: str
) -> tuple[np.ndarray | QTensor, SecondLevel | None, np.ndarray | None]:
    """Scales [blocks of a row, N], how they are quantized and their offset."""
    n, groups = shape
    blocks = n * groups
    absmax = take(tensors, "weight.absmax", where, 1)
    if absmax.shape != (blocks,):
        raise ValueError(f"{where}: weight.absmax is {absmax.shape}, for {blocks} blocks.")
    if absmax.dtype == np.float32:
        return absmax.reshape(shape).T, None, None
    require(absmax, "weight.absmax", where, dtype=np.uint8)
    nested_size = fields.integer("nested_blocksize")
    table = take(tensors, "weight.nested_quant_map", where, 1)
    require(table, "weight.nested_quant_map", where, dtype=np.float32, shape=(256,))
    nested = take(tensors, "weight.nested_absmax", where, 1)
    require(
        nested, "weight.nested_absmax", where, dtype=np.float32, shape=(-(-blocks // nested_size),)
    )
    check_finite(nested, f"{where}: weight.nested_absmax")
    check_finite(table, f"{where}: weight.nested_quant_map")
    outer = nested[np.arange(blocks) // nested_size]
    offset = np.float32(fields.number("nested_offset"))
    with np.errstate(over="ignore", invalid="ignore"):  # scales that are not finite are refused
        scale = (table[absmax] * outer + offset).reshape(shape).T
    granularity = _nested_blocks(shape, nested_size)
    if granularity is None or not (scale >= FLOAT32.smallest).all() or (np.diff(table) <= 0).any():
        return scale, None, None
    same = np.array_equal(table, np.array(formats.DYNAMIC8.values, np.float32))
    fmt = formats.DYNAMIC8 if same else formats.codebook(table.tolist())
    level = SecondLevel(spec=QuantSpec(format=fmt, granularity=granularity), offset="mean")
    inner = nested.reshape(n, -1) if nested.size >= n else nested.reshape(-1, 1)
    codes = make_qtensor(absmax.reshape(shape), level.spec, inner, where=where)
    return codes, level, np.full((1, 1), offset)


def _nested_blocks(shape: tuple[int, int], size: int) -> Block | None:
    """The blocks of scales [N, groups] that share a nested one; None if they are not whole."""
    n, groups = shape
    if size > 0 and groups % size == 0:
        return Block(1, size)
    if size > 0 and size % groups == 0 and n % (size // groups) == 0:
        return Block(size // groups, None)
    return None


def _read(state: np.ndarray, where: str) -> tuple[Fields, tuple[int, int]]:
    require(state, STATE, where, dtype=np.uint8)
    try:
        content: Any = json.loads(state.tobytes())
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{where}: {STATE} is not JSON ({error}).") from None
    if not isinstance(content, dict):
        raise ValueError(f"{where}: {STATE} is not a JSON object.")
    fields = Fields(content, f"{where}: {STATE}")
    if fields.text("quant_type") != "nf4":
        fields.unsupported("quant_type", "known is 'nf4'")
    match content.get("shape"):
        case [int(n), int(k)] if 0 < n < 2**31 and 0 < k < 2**31:
            return fields, (n, k)
    raise ValueError(f"{where}: {STATE}: shape is {content.get('shape')!r}, and not two lengths.")
