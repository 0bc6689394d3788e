"""GGUF's quantized blocks <-> QTensors: codes and scales as they lie in the file.

A tensor [N, K] is rows of blocks. Element numbers are those inside a block; d is a float16.

| type | block | bytes | codes |
|---|---|---|---|
| Q4_0 | 32 | d, 16 | byte j: element j low, element j + 16 high; (q - 8) d; d may be negative |
| Q8_0 | 32 | d, 32 | int8; q d |
| TQ2_0 | 256 | 64, d | bits 2 n of byte m of 32-byte chunk c: element 128 c + 32 n + m; (q - 1) d |
| TQ1_0 | 256 | 48, 4, d | base 3, first digit most significant; (q - 1) d |
| MXFP4 | 32 | e8m0, 16 | as Q4_0; e2m1 times 2**(e - 127) |

TQ1_0: five digits, v, are stored as the byte ceil(v 256 / 243), so that digit n is
`(byte 3**n mod 256) 3 >> 8`. Bytes 0 to 31 hold elements m + 32 n, bytes 32 to 47 elements
160 + m + 16 n, the last four elements 240 + j + 4 m, in four digits and a 0.
"""

import dataclasses
from collections.abc import Callable
from typing import Final

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np

from lowbit_jax import formats
from lowbit_jax.formats import Format, IntGrid
from lowbit_jax.interop.codecs.parts import (
    DoesNotFit,
    Kernel,
    codes_of,
    expanded,
    group_size,
    make_qtensor,
    refuse,
    scale_of,
    stored_scales,
)
from lowbit_jax.qtensor import QTensor
from lowbit_jax.scale_formats import E8M0, FLOAT16, ScaleFormat
from lowbit_jax.spec import PerGroup, QuantSpec

Blocks = np.ndarray  # uint8 [blocks, bytes]
Codes = np.ndarray  # uint8 [blocks, elements]
_NEAREST: Final = "w4a16_g32, w8a16_g32, w1_58a16 or mxfp4a16"
_E8M0: Final = np.dtype(ml_dtypes.float8_e8m0fnu)


def _nibbles(data: Blocks) -> Codes:
    return np.concatenate([data & 15, data >> 4], axis=1)


def _from_nibbles(codes: Codes) -> Blocks:
    return codes[:, :16] | codes[:, 16:] << 4


def _q8(data: Blocks) -> Codes:
    return data + np.uint8(128)


_SHIFTS: Final = np.array([0, 2, 4, 6], np.uint8).reshape(1, 1, 4, 1)


def _tq2(data: Blocks) -> Codes:
    fields = data.reshape(-1, 2, 1, 32) >> _SHIFTS
    return (fields & 3).reshape(len(data), 256)


def _from_tq2(codes: Codes) -> Blocks:
    fields = codes.reshape(-1, 2, 4, 32) << _SHIFTS
    return np.bitwise_or.reduce(fields, axis=2).reshape(len(codes), 64)


# Of TQ1_0: first byte, bytes, digits in each, first element.
_TQ1: Final = ((0, 32, 5, 0), (32, 16, 5, 160), (48, 4, 4, 240))


def _tq1(data: Blocks) -> Codes:
    codes = np.empty((len(data), 256), np.uint8)
    for at, count, digits, first in _TQ1:
        part = data[:, at : at + count]
        for n in range(digits):
            shifted = (part * np.uint8(3**n)).astype(np.uint16)  # modulo 256
            place = slice(first + n * count, first + (n + 1) * count)
            codes[:, place] = (shifted * np.uint16(3)) >> np.uint16(8)
    return codes


def _from_tq1(codes: Codes) -> Blocks:
    data = np.empty((len(codes), 52), np.uint8)
    for at, count, digits, first in _TQ1:
        trits = codes[:, first : first + digits * count].reshape(-1, digits, count)
        powers = np.uint16(3) ** np.arange(4, 4 - digits, -1, dtype=np.uint16)
        value = (trits * powers.reshape(1, -1, 1)).sum(axis=1, dtype=np.uint16)
        data[:, at : at + count] = (value * np.uint32(256) + np.uint32(242)) // np.uint32(243)
    return data


@dataclasses.dataclass(frozen=True)
class BlockType:
    """How one type of GGUF keeps codes and scales.

    elements, size: Of one block, the latter in bytes.
    scale_at: Where the scale lies, in bytes from the begin of the block.
    scale_format: Of the scale.
    format: What its codes stand for.
    unpack, pack: Bytes of the codes to codes, uint8 [blocks, elements], and back.
    """

    name: str
    elements: int
    size: int
    scale_at: int
    scale_format: ScaleFormat
    format: Format
    unpack: Callable[[Blocks], Codes]
    pack: Callable[[Codes], Blocks]

    @property
    def scale_bytes(self) -> slice:
        """The bytes of the scale."""
        return slice(self.scale_at, self.scale_at + np.dtype(self.scale_format.dtype).itemsize)

    @property
    def spec(self) -> QuantSpec:
        """What its tensors are quantized as."""
        return QuantSpec(
            format=self.format,
            granularity=PerGroup(self.elements),
            scale_format=self.scale_format,
        )


_E2M1: Final = formats.FP4_E2M1
BLOCK_TYPES: Final = {
    kind.name: kind
    for kind in (
        BlockType("Q4_0", 32, 18, 0, FLOAT16, formats.INT4, _nibbles, _from_nibbles),
        BlockType("Q8_0", 32, 34, 0, FLOAT16, formats.INT8, _q8, _q8),
        BlockType("TQ1_0", 256, 54, 52, FLOAT16, formats.TERNARY, _tq1, _from_tq1),
        BlockType("TQ2_0", 256, 66, 64, FLOAT16, formats.TERNARY, _tq2, _from_tq2),
        BlockType("MXFP4", 32, 17, 0, E8M0, _E2M1, _nibbles, _from_nibbles),
    )
}


def split(data: np.ndarray, kind: BlockType) -> tuple[np.ndarray, Codes]:
    """Scales, as stored [blocks], and codes, uint8 [blocks, elements], of uint8 data."""
    blocks = data.reshape(-1, kind.size)
    scales = np.ascontiguousarray(blocks[:, kind.scale_bytes])
    codes = kind.unpack(np.delete(blocks, kind.scale_bytes, axis=1))
    return scales.view(_stored_dtype(kind)).reshape(-1), codes


def join(scales: np.ndarray, codes: Codes, kind: BlockType) -> np.ndarray:
    """The inverse of `split`: uint8 [blocks * size]."""
    packed = kind.pack(codes)
    raw = np.ascontiguousarray(scales.astype(_stored_dtype(kind))).view(np.uint8)
    parts = [packed[:, : kind.scale_at], raw.reshape(len(codes), -1), packed[:, kind.scale_at :]]
    return np.concatenate(parts, axis=1).reshape(-1)


def _stored_dtype(kind: BlockType) -> np.dtype:
    return _E8M0 if kind.scale_format is E8M0 else np.dtype("<f2")


def decode(data: np.ndarray, shape: tuple[int, int], type: str, *, where: str) -> Kernel:
    """The kernel in a tensor's bytes.

    Args:
        data: uint8, of all blocks.
        shape: (N, K), as in the file; K is a whole number of blocks.
        type: One of `BLOCK_TYPES`.
        where: The tensor, for messages.
    Raises: ValueError: A scale is NaN or infinite, or a code stands for no value.
    """
    kind, (n, k) = BLOCK_TYPES[type], shape
    scales, codes = split(data, kind)
    scale = scales.reshape(n, k // kind.elements).T
    return Kernel(make_qtensor(codes.reshape(n, k).T, kind.spec, scale, where=where))


def types_for(spec: QuantSpec) -> tuple[str, ...]:
    """The types that hold the values of a scheme, the smallest first.

    Integers that are all in the range of a wider type are kept by it too, as the same integers.

    Raises: NotImplementedError: There are none.
    """
    values = integer_values(spec)
    if spec.format is _E2M1 and spec.scale_format is E8M0:
        types: tuple[str, ...] = ("MXFP4",)
    elif values is None or spec.scale_format.name in ("e4m3", "e8m0"):
        reason = "it keeps integers without zero points and float16 scales, or MXFP4"
        refuse(spec, "GGUF", reason, _NEAREST)
    else:
        low, high = values.min(), values.max()
        types = ("TQ1_0", "TQ2_0") if low >= -1 and high <= 1 and 0 in values else ()
        types += ("Q4_0",) if low >= -8 and high <= 7 else ()
        types += ("Q8_0",)
    size = getattr(spec.granularity, "k", None)
    if size is not None and size % 32:
        refuse(spec, "GGUF", f"its blocks of 32 are no part of groups of {size}", _NEAREST)
    return types


def integer_values(spec: QuantSpec) -> np.ndarray | None:
    """The integer that each code stands for; None if they are none, or relative to a zero point."""
    if not isinstance(spec.format, IntGrid) or not spec.symmetric:
        return None
    codes = np.arange(spec.format.levels if spec.format is formats.TERNARY else 2**spec.bits)
    values = codes * spec.format.step + spec.format.low
    return values.astype(np.int64) if (values == np.round(values)).all() else None


def encode(kernel: Kernel, type: str, *, where: str) -> np.ndarray:
    """A tensor's bytes, uint8: the inverse of `decode`.

    Scales of longer groups stand in each of their blocks; the values do not change.

    Raises:
        NotImplementedError: The type has no such scheme.
        DoesNotFit: Rows are no whole blocks.
        ValueError: A scale that float16 does not have.
    """
    kind, q = BLOCK_TYPES[type], kernel.qtensor
    if type not in types_for(q.spec):
        refuse(q.spec, f"GGUF's {type}", f"it keeps {kind.spec.describe()}", _NEAREST)
    if kernel.input_permutation is not None:
        refuse(q.spec, "GGUF", "inputs keep their order", "the same without activation order")
    if not fits(kernel, type):
        raise DoesNotFit(f"{where}: {why_not(kernel, type)}")
    codes = _codes_for(q, kind)
    scale = scale_of(q)
    if kind.scale_format is FLOAT16:
        scale = stored_scales(scale, FLOAT16, where)
    scales = expanded(scale, q, kind.elements).T.reshape(-1)
    return join(scales, np.ascontiguousarray(codes.T).reshape(-1, kind.elements), kind)


def fits(kernel: Kernel, type: str) -> bool:
    """Whether rows, and the groups of their scales, are whole blocks of a type."""
    elements = BLOCK_TYPES[type].elements
    return not (kernel.qtensor.k % elements or group_size(kernel.qtensor) % elements)


def why_not(kernel: Kernel, type: str) -> str:
    """What does not fit, in words."""
    return (
        f"rows of {kernel.qtensor.k} in groups of {group_size(kernel.qtensor)} are no whole blocks "
        f"of {BLOCK_TYPES[type].elements}, of which {type} is made."
    )


def _codes_for(q: QTensor, kind: BlockType) -> np.ndarray:
    """Codes of a QTensor as those that stand for the same values in another format."""
    codes = codes_of(q)
    values = integer_values(q.spec)
    if values is None or q.spec.format is kind.format:
        return codes
    assert isinstance(kind.format, IntGrid)
    table = np.zeros(2**q.spec.bits, np.uint8)
    table[: len(values)] = values - int(kind.format.low)
    return table[codes]


def dequantize(data: np.ndarray, type: str) -> np.ndarray:
    """float32 values of a tensor's bytes, in the order of the file: one product each."""
    kind = BLOCK_TYPES[type]
    scales, codes = split(data, kind)
    table = np.asarray(jax.device_get(kind.format.decode(jnp.arange(2**kind.format.bits))))
    return (table[codes] * scales.astype(np.float32)[:, None]).reshape(-1).astype(np.float32)
