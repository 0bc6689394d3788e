"""What all codecs share: the kernel between two formats, and checks of what a file says."""

import dataclasses
from collections.abc import Mapping
from typing import Any, Final, NoReturn

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np

from lowbit_jax import packing
from lowbit_jax.formats import Format, IntGrid, Learned
from lowbit_jax.qtensor import QTensor, with_one_level
from lowbit_jax.scale_formats import BFLOAT16, FLOAT16, FLOAT32, ScaleFormat
from lowbit_jax.spec import Block, PerChannel, PerGroup, PerTensor, QuantSpec

_BY_DTYPE: Final = {
    np.dtype(np.float32): FLOAT32,
    np.dtype(np.float16): FLOAT16,
    np.dtype(ml_dtypes.bfloat16): BFLOAT16,
}
_CHUNK: Final = 2**22  # codes that are packed at a time


class DoesNotFit(NotImplementedError):
    """The format has the scheme, and cannot hold it at this kernel's shape."""


@dataclasses.dataclass(frozen=True)
class Kernel:
    """One quantized kernel [K, N] of a linear layer: what every codec decodes to, and encodes.

    qtensor: Codes, scales and zero points.
    input_permutation: int32 [K]: row r of `qtensor` is row `input_permutation[r]` of the kernel;
        None: they are in order.
    global_divisor: float32 [1, 1]: the number in the file whose reciprocal is the QTensor's global
        scale; None where the file has no such thing.
    """

    qtensor: QTensor
    input_permutation: np.ndarray | None = None
    global_divisor: np.ndarray | None = None

    def dequantize(self) -> np.ndarray:
        """float32 [K, N], rows in the kernel's own order: `qtensor.dequantize()`, on the host."""
        q = self.qtensor
        if isinstance(q.spec.format, Learned):
            return np.asarray(jax.device_get(q.dequantize(jnp.float32)))
        table = np.asarray(jax.device_get(q.spec.format.decode(jnp.arange(2**q.spec.bits))))
        values = table[codes_of(q)]
        if q.zero_point is not None:
            values -= expanded(np.asarray(jax.device_get(q.zero_point)), q).astype(np.float32)
        scale = scale_of(q).astype(np.float32)
        if q.global_scale is not None:
            scale = scale * np.asarray(jax.device_get(q.global_scale))
        with np.errstate(over="ignore"):  # infinite, as the QTensor's own
            values *= expanded(scale, q)
        if self.input_permutation is None:
            return values
        ordered = np.empty_like(values)
        ordered[self.input_permutation] = values
        return ordered


def make_qtensor(
    codes: np.ndarray,
    spec: QuantSpec,
    scale: np.ndarray | QTensor,
    *,
    zero_point: np.ndarray | None = None,
    global_scale: np.ndarray | None = None,
    scale_offset: np.ndarray | None = None,
    where: str,
) -> QTensor:
    """A QTensor of codes uint8 [K, N] and scales in their stored dtype; dequantizes to float32.

    Raises: ValueError: A scale or a code that stands for no number.
    """
    stored: jax.Array | QTensor
    if isinstance(scale, QTensor):
        stored = scale
    else:
        check_finite(scale, f"{where}: the scales")
        stored = jnp.asarray(np.ascontiguousarray(scale), spec.scale_format.dtype)
    if global_scale is not None:
        check_finite(global_scale, f"{where}: the global scale")
    check_codes(codes, spec.format, where)
    return QTensor(
        words=_packed(codes, spec.format),
        scale=stored,
        zero_point=None if zero_point is None else jnp.asarray(np.ascontiguousarray(zero_point)),
        global_scale=None if global_scale is None else jnp.asarray(global_scale, jnp.float32),
        spec=spec,
        k=codes.shape[0],
        dtype=jnp.dtype(jnp.float32),
        scale_offset=None if scale_offset is None else jnp.asarray(scale_offset, jnp.float32),
    )


def codes_of(q: QTensor) -> np.ndarray:
    """The codes of a QTensor, uint8 [K, N], on the host."""
    words = [np.asarray(jax.device_get(plane)) for plane in q.words]
    codes = np.empty(q.shape, np.uint8)
    for columns in _columns(codes):
        part = tuple(plane[:, columns] for plane in words)
        codes[:, columns] = packing.unpack_planes(part, q.spec.bits, q.k)
    return codes


def _packed(codes: np.ndarray, fmt: Format) -> tuple[jax.Array, ...]:
    """The words of codes, on the device; packed some columns at a time."""
    k, n = codes.shape
    rows = packing.padded_length(k)
    planes = [
        np.empty((rows * width // packing.WORD, n), np.int32) for width in packing.PLANES[fmt.bits]
    ]
    for columns in _columns(codes):
        parts = packing.pack_planes(codes[:, columns], fmt.bits, pad_code=fmt.zero_code)
        for plane, part in zip(planes, parts, strict=True):
            plane[:, columns] = part
    return tuple(jnp.asarray(plane) for plane in planes)


def _columns(codes: np.ndarray) -> list[slice]:
    k, n = codes.shape
    step = max(1, _CHUNK // max(k, 1))
    return [slice(at, min(at + step, n)) for at in range(0, n, step)]


def scale_of(q: QTensor) -> np.ndarray:
    """The scales of a QTensor in their stored dtype (quantized ones in float32), on the host."""
    return np.asarray(jax.device_get(with_one_level(q).scale))


def scale_format_of(scale: np.ndarray, where: str) -> ScaleFormat:
    """The format of scales that a file keeps in floats. Raises: ValueError: They are no floats."""
    if scale.dtype not in _BY_DTYPE:
        raise ValueError(
            f"{where}: the scales are {scale.dtype}, and not one of {[str(d) for d in _BY_DTYPE]}."
        )
    return _BY_DTYPE[scale.dtype]


def stored_scales(scale: np.ndarray, target: ScaleFormat, what: str) -> np.ndarray:
    """Scales in the dtype that a file keeps: nearest, ties to even.

    Raises: ValueError: One would become infinite, or zero without being it.
    """
    with np.errstate(over="ignore"):
        stored = scale.astype(np.float32).astype(target.dtype)
    lost = ~np.isfinite(stored.astype(np.float32)) | ((stored == 0) & (scale != 0))
    if lost.any():
        worst = scale.astype(np.float32)[lost][0]
        raise ValueError(
            f"{what}: {int(lost.sum())} of {lost.size} scales have no {target.name} value, the "
            f"first being {worst:g}. Quantize with scale_format {target.name} from the start."
        )
    return stored


def expanded(array: np.ndarray, q: QTensor, size: int = 1) -> np.ndarray:
    """Scales or zero points of a QTensor, one for each `size` rows and each column: [K / size, N].

    Args:
        array: Of the spec's scale shape.
        q: Whose they are.
        size: Rows of a group, which divides those of the QTensor.
    """
    k, n = q.shape
    array = np.repeat(array, k // array.shape[0] // size, axis=0)
    return np.repeat(array, n // array.shape[1], axis=1)


def group_size(q: QTensor) -> int:
    """Rows that share a scale."""
    return q.k // q.spec.scale_shape(q.shape)[-2]


def grouping(k: int, groups: int, where: str) -> Block:
    """The granularity of `groups` scales per column of length `k`.

    Raises: NotImplementedError: They do not divide it.
    """
    if groups < 1 or k % groups:
        raise NotImplementedError(
            f"{where}: {groups} groups for an input axis of {k}: a last group that is shorter than "
            "the others is not supported."
        )
    return PerChannel() if groups == 1 else PerGroup(k // groups)


def by_shape(k: int, n: int, scale: tuple[int, ...], where: str) -> Block:
    """The granularity of scales of the shape [K / size, N / size].

    Raises: ValueError: The shape divides no kernel [k, n].
    """
    if len(scale) != 2 or 0 in scale or k % scale[0] or n % scale[1]:
        raise ValueError(
            f"{where}: scales of shape {scale[::-1]} do not divide a weight of shape {(n, k)}."
        )
    if scale == (1, 1):
        return PerTensor()
    if scale[1] == n:
        return grouping(k, scale[0], where)
    return Block(None if scale[0] == 1 else k // scale[0], None if scale[1] == 1 else n // scale[1])


def take(tensors: Mapping[str, np.ndarray], name: str, where: str, *ranks: int) -> np.ndarray:
    """A part of a kernel. Raises: ValueError: It is missing, or has none of the ranks."""
    if name not in tensors:
        raise ValueError(f"{where}: {name} is missing. There are: {sorted(tensors)}.")
    if tensors[name].ndim not in ranks:
        raise ValueError(
            f"{where}: {name} has the shape {tensors[name].shape}, and one of "
            f"{' or '.join(map(str, ranks))} axes is needed."
        )
    return tensors[name]


def require(
    tensor: np.ndarray, name: str, where: str, *, dtype: Any, shape: tuple[int, ...] | None = None
) -> None:
    """Raises ValueError unless a part has this dtype and shape."""
    if tensor.dtype != np.dtype(dtype) or (shape is not None and tensor.shape != shape):
        wanted = f"{np.dtype(dtype)} {shape if shape is not None else ''}".strip()
        raise ValueError(f"{where}: {name} is {tensor.dtype} {tensor.shape}, and not {wanted}.")


def check_finite(scale: np.ndarray, what: str) -> None:
    """Raises ValueError for scales that are NaN or infinite."""
    finite = np.isfinite(scale.astype(np.float32))
    if not finite.all():
        bad = int(finite.size - finite.sum())
        raise ValueError(
            f"{what} hold {bad} of {finite.size} values that are NaN or infinite: the file is "
            "damaged, or was read with the wrong layout."
        )


def check_codes(codes: np.ndarray, fmt: Format, where: str) -> None:
    """Raises ValueError for codes of nothing: ternary's 3, NaN and infinities of fp8."""
    unused = {"ternary": [3], "fp8_e4m3": [0x7F, 0xFF]}.get(fmt.name, [])
    if fmt.name == "fp8_e5m2":
        unused = [*range(0x7C, 0x80), *range(0xFC, 0x100)]
    wrong = np.isin(codes, unused) if unused else np.zeros(1, bool)
    if wrong.any():
        raise ValueError(
            f"{where}: {int(wrong.sum())} of {wrong.size} codes stand for no value of {fmt.name}: "
            "the file is damaged, or was read with the wrong layout."
        )


def refuse(spec: QuantSpec, target: str, reason: str, nearest: str) -> NoReturn:
    """Raises NotImplementedError for a scheme that a format cannot hold."""
    raise NotImplementedError(
        f"{target} cannot hold {spec.describe()}: {reason}. The nearest that fits: {nearest}."
    )


def middle(bits: int) -> int:
    """The zero point of a symmetric grid: the code of 0."""
    return 2 ** (bits - 1)


def is_signed_grid(fmt: Format) -> bool:
    """Whether codes are `value + 2**(bits - 1)`, narrow or not: what symmetric integers are."""
    return isinstance(fmt, IntGrid) and fmt.step == 1 and fmt.low == -middle(fmt.bits)
