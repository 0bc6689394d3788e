"""Unsigned codes with a zero point, the common tongue of GPTQ, AWQ and compressed-tensors.

W = (code - zero) * scale. A grid of consecutive integers has one zero for all groups (8 for int4, 1
for ternary); a file whose zeros are all the middle of the range is symmetric.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from lowbit_jax import formats, packing
from lowbit_jax.formats import IntGrid
from lowbit_jax.interop.codecs.parts import expanded, group_size, middle, refuse, require
from lowbit_jax.qtensor import QTensor
from lowbit_jax.scale_formats import ScaleFormat
from lowbit_jax.spec import Granularity, QuantSpec


class Zeros(NamedTuple):
    """What zero points make of a file's codes: a spec, and the zero points if it has any."""

    spec: QuantSpec
    zero_point: np.ndarray | None


def spec_of_zeros(
    zeros: np.ndarray | None, bits: int, granularity: Granularity, scale_format: ScaleFormat
) -> Zeros:
    """The spec of unsigned codes with zero points uint8 [G, N]; None: all are the middle."""
    symmetric = zeros is None or bool((zeros == middle(bits)).all())
    spec = QuantSpec(
        format=formats.get(f"{'int' if symmetric else 'uint'}{bits}"),
        granularity=granularity,
        symmetric=symmetric,
        scale_format=scale_format,
    )
    return Zeros(spec, None if symmetric else zeros)


def zeros_of(q: QTensor, target: str, nearest: str) -> np.ndarray:
    """The zero points of a QTensor's unsigned codes, uint8 of the shape of its scale.

    Raises: NotImplementedError: Its codes are no consecutive integers, or its scales have another
        level; the message says what `target` holds.
    """
    fmt = q.spec.format
    if q.zero_point is not None:
        return np.asarray(jax.device_get(q.zero_point))
    if not isinstance(fmt, IntGrid) or fmt.step != 1 or not float(fmt.low).is_integer():
        refuse(q.spec, target, "its codes are no consecutive integers with a zero point", nearest)
    if q.spec.scale_format.name in ("e4m3", "e8m0"):
        refuse(q.spec, target, "its scales are plain floats", nearest)
    return np.full(q.spec.scale_shape(q.shape), int(-fmt.low), np.uint8)


def grouped(array: np.ndarray, q: QTensor) -> np.ndarray:
    """Scales or zero points [G, N], also where a spec shares them between columns."""
    return expanded(array, q, group_size(q))


def words_as_they_are(words: np.ndarray, found: Zeros, scale: np.ndarray, k: int) -> QTensor | None:
    """A QTensor of a file's words [K * bits / 32, N], where they are ours already; or else None."""
    bits = found.spec.bits
    if packing.PLANES[bits] != (bits,) or k % packing.WORD:
        return None
    return QTensor(
        words=(jnp.asarray(np.ascontiguousarray(words)),),
        scale=jnp.asarray(np.ascontiguousarray(scale)),
        zero_point=None if found.zero_point is None else jnp.asarray(found.zero_point),
        global_scale=None,
        spec=found.spec,
        k=k,
        dtype=jnp.dtype(jnp.float32),
    )


def permutation_of(g_idx: np.ndarray | None, k: int, groups: int, where: str) -> np.ndarray | None:
    """The rows sorted by their group in `g_idx`, int32 [K]; None where they are.

    Raises:
        ValueError: It names no groups of rows.
        NotImplementedError: Groups of several lengths.
    """
    if g_idx is None:
        return None
    require(g_idx, "g_idx", where, dtype=np.int32, shape=(k,))
    if g_idx.min() < 0 or g_idx.max() >= groups:
        raise ValueError(f"{where}: g_idx names groups outside [0, {groups}).")
    if (np.bincount(g_idx, minlength=groups) != k // groups).any():
        raise NotImplementedError(
            f"{where}: g_idx gives some groups more than {k // groups} of {k} rows; groups of "
            "several lengths are not supported."
        )
    if (np.diff(g_idx) >= 0).all():
        return None
    return np.argsort(g_idx, kind="stable").astype(np.int32)
