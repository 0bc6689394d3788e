"""Rows of activations to 8 bits in one pass (kernel K4): what feeds the integer products.

One block holds a whole row, so that the row is read once from memory: its largest magnitude, its
codes and, if asked for, the sum of its codes in every group along K (which zero points and offsets
multiply) come out of the same pass. In front of the rounding the row may be normalized (RMSNorm,
arXiv:1910.07467) or rotated by blocks of a Hadamard matrix (QuaRot, arXiv:2404.00456), in float32:

    y = x / sqrt(mean(x**2) + eps) * weight,   or   y = x @ H / sqrt(block), H the Sylvester matrix.

Rounding is that of `activations.quantize_rows`, with the same arithmetic: absmax * (1 / 127), the
reciprocal of that, one product, nearest with ties to even. `reference` beside the kernels is the
same in float64.
"""

import dataclasses
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np

from kernels_pallas.activations import LARGEST, quantize_rows


@dataclasses.dataclass(frozen=True, kw_only=True)
class Rounding:
    """What is static about one pass.

    Attributes:
        act: "int8" (-127 .. 127) or "fp8" (e4m3).
        group: Elements along K whose codes are summed; None: no sums.
        prologue: None, "rms" (with a weight for every element) or "hadamard".
        eps: Added to the mean of squares by "rms".
        block: Elements that "hadamard" rotates together: a power of two.

    Raises:
        ValueError: A field that no pass can have.
    """

    act: Literal["int8", "fp8"]
    group: int | None = None
    prologue: Literal["rms", "hadamard"] | None = None
    eps: float = 1e-6
    block: int = 128

    def __post_init__(self) -> None:
        if self.act not in LARGEST:
            raise ValueError(f"Rounding: act is one of {list(LARGEST)}, not {self.act!r}.")
        if self.prologue not in (None, "rms", "hadamard"):
            raise ValueError(f"Rounding: there is no prologue {self.prologue!r}.")
        if self.group is not None and self.group < 1:
            raise ValueError(f"Rounding: groups of {self.group}.")
        if self.block < 1 or self.block & (self.block - 1):
            raise ValueError(f"Rounding: Hadamard blocks of {self.block}, not a power of two.")


def hadamard(size: int) -> np.ndarray:
    """Sylvester's matrix of 1 and -1, [size, size], symmetric."""
    matrix = np.ones((1, 1), np.int8)
    while len(matrix) < size:
        matrix = np.block([[matrix, matrix], [matrix, -matrix]])
    return matrix


def why_not(rounding: Rounding, k: int, dtype: Any) -> str | None:
    """Why the kernels do not make this pass over rows of K elements; None: they do."""
    unit = unit_of(rounding)
    if rounding.group is not None and k % rounding.group:
        return f"K of {k} does not split into groups of {rounding.group}"
    if rounding.prologue == "hadamard" and (k % rounding.block or rounding.block > 128):
        return f"K of {k} is not whole Hadamard blocks of {rounding.block}, at most 128"
    if rounding.group is not None and rounding.group % unit:
        return f"groups of {rounding.group}; the kernels sum pieces of {unit}"
    if jnp.dtype(dtype).name not in ("bfloat16", "float16", "float32"):
        return f"x of {jnp.dtype(dtype).name}"
    # On Hopper the row, and what a prologue makes of it, lie in 227 KB.
    held = jnp.dtype(dtype).itemsize + 1 + (8 if rounding.prologue else 0)
    if k * held > 200 * 1024:
        return f"rows of {k} elements, of which {200 * 1024 // held} fit a block"
    return None


def unit_of(rounding: Rounding) -> int:
    """Elements that lie side by side in one piece of a row: what is summed, or rotated, at once."""
    if rounding.prologue == "hadamard":
        return max(rounding.block, 32)
    if rounding.group is None or rounding.group % 128 == 0:
        return 128
    return next((unit for unit in (64, 32) if rounding.group % unit == 0), 32)


def reference(
    x: jax.Array, rounding: Rounding, weight: jax.Array | None = None
) -> tuple[jax.Array, jax.Array, jax.Array | None]:
    """The pass in plain jnp; see `api.round_rows`."""
    y = x.astype(jnp.float32)
    if rounding.prologue == "rms":
        assert weight is not None
        mean = jnp.mean(jnp.square(y), axis=1, keepdims=True)
        y = y * jax.lax.rsqrt(mean + np.float32(rounding.eps)) * weight.astype(jnp.float32)[None]
    elif rounding.prologue == "hadamard":
        blocks = y.reshape(y.shape[0], -1, rounding.block)
        matrix = jnp.asarray(hadamard(rounding.block), jnp.float32)
        blocks = jnp.einsum("mbi,ij->mbj", blocks, matrix, precision="highest")
        y = blocks.reshape(y.shape) * np.float32(rounding.block**-0.5)
    codes, scale = quantize_rows(y, rounding.act)
    if rounding.group is None:
        return codes, scale, None
    split = (len(codes), codes.shape[1] // rounding.group, rounding.group)
    sums = codes.astype(jnp.float32).reshape(split).sum(axis=2)
    return codes, scale, sums
