"""Prepared: a packed matrix as a backend's kernels take it."""

import dataclasses
import math
from typing import Any, Literal

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, UInt8

from lowbit_jax import packing
from lowbit_jax.blocks import BlockView
from lowbit_jax.grid import Range, decoded, effective_scale, from_levels
from lowbit_jax.ops import backends
from lowbit_jax.qtensor import QTensor
from lowbit_jax.spec import Block, QuantSpec

Target = Literal["auto", "xla", "cpu", "mosaic_gpu", "mosaic_tpu"]


@dataclasses.dataclass(frozen=True)
class Meta:
    """What is static about a packed matrix.

    Attributes:
        spec: How it is quantized.
        k: Its rows.
        n: Its columns.
        dtype: That of `dequantize()`.
        target: The backend in whose order the words lie; "xla" is that of a QTensor.
    """

    spec: QuantSpec
    k: int
    n: int
    dtype: Any
    target: str

    @property
    def group(self) -> int | None:
        """Elements of K that share a scale; None: all of them."""
        size = self.spec.granularity.k
        return None if size is None or size == self.k else size


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, eq=False)
class Prepared:
    """A packed matrix [.., K, N] in the order of one backend: made at load, and never saved.

    Attributes:
        words: Planes of codes, in the backend's order.
        scale: float32 [.., G, N], any global scale multiplied in.
        zero_point: uint8 of the same shape; None if symmetric.
        meta: What is static about it.
        basis: float32 [.., P * G, N], the values of a learned format; None for the others.
    """

    words: Any
    scale: Float[Array, "... g n"]
    zero_point: UInt8[Array, "... g n"] | None
    meta: Meta = dataclasses.field(metadata={"static": True})
    basis: Float[Array, "... p n"] | None = None

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of the array that it stands for."""
        return (*self.scale.shape[:-2], self.meta.k, self.meta.n)

    @property
    def ndim(self) -> int:
        """Rank of the array that it stands for."""
        return len(self.shape)

    @property
    def dtype(self) -> Any:
        """That of `dequantize()`."""
        return self.meta.dtype

    def __getitem__(self, index: Any) -> "Prepared":
        if index is not Ellipsis:
            raise NotImplementedError(f"Prepared[{index}]: only q[...], which is q, is supported.")
        return self

    @property
    def nbytes(self) -> int:
        """Bytes of words, scales and zero points, padding included."""
        return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(self))

    @property
    def size(self) -> int:
        """Elements of the array that it stands for."""
        return math.prod(self.shape)

    @property
    def bits_per_weight(self) -> float:
        """Bits an element takes, with its share of scales, zero points and padding."""
        return self.nbytes * 8 / self.size

    def dequantize(self, dtype: Any = None) -> Array:
        """The matrix [K, N]; bit for bit that of the QTensor it was made of.

        Args:
            dtype: Default: that of the array it was made from.
        """
        meta = self.meta
        words = backends.get(meta.target).canonical_words(self.words, meta)
        codes = packing.unpack_planes(words, meta.spec.bits, meta.k)
        # Scales lie spread over N, as kernels read them.
        spread = dataclasses.replace(meta.spec, granularity=Block(meta.group, 1))
        view = BlockView.of((meta.k, meta.n), spread)
        zero_point = None if self.zero_point is None else self.zero_point.astype(jnp.float32)
        range_ = Range(self.scale, zero_point, basis=self.basis)
        levels = decoded(view.split(codes), meta.spec, range_, view)
        return from_levels(levels, range_, view, jnp.dtype(dtype or meta.dtype))


def prepare(qtensor: QTensor, target: Target = "auto") -> Prepared:
    """A packed matrix in the order that a backend's kernels read fastest.

    `matmul` takes it in place of the QTensor. It holds its own copy of the codes, so keep one of
    the two. Under jit the reordering is part of the program: call it once, when a model is loaded.

    Args:
        qtensor: [.., K, N]; leading axes are a stack.
        target: The backend; "auto" is the one that `matmul` would choose here.

    Raises:
        ValueError: An unknown target, or a QTensor that is no matrix.
        NotImplementedError: The backend has no kernels for such a matrix, or none here.
    """
    if not isinstance(qtensor.spec.granularity, Block) or qtensor.ndim < 2:
        raise ValueError(
            f"prepare: {qtensor!r}, {qtensor.spec.describe()}, is not a kernel [.., K, N]."
        )
    given = canonical(qtensor)
    name = backends.choose(given.meta, None) if target == "auto" else target
    backend = backends.get(name)
    if reason := backend.why_not(given.meta, None):
        raise NotImplementedError(f"prepare: target {name!r}: {reason}.")

    def reorder(words: Any) -> Any:
        return backend.prepare_words(words, given.meta)

    for _ in qtensor.shape[:-2]:
        reorder = jax.vmap(reorder)
    meta = dataclasses.replace(given.meta, target=name)
    return Prepared(reorder(given.words), given.scale, given.zero_point, meta, given.basis)


def canonical(qtensor: QTensor) -> Prepared:
    """A QTensor in the order in which it lies, with its scales spread over N."""
    k, n = qtensor.shape[-2:]
    range_ = qtensor.range()
    scale = _spread(effective_scale(range_), n)
    zero_point = None if qtensor.zero_point is None else _spread(qtensor.zero_point, n)
    meta = Meta(qtensor.spec, k, n, jnp.dtype(qtensor.dtype), "xla")
    basis = None if qtensor.basis is None else _spread(qtensor.basis, n)
    return Prepared(qtensor.words, scale, zero_point, meta, basis)


def _spread(x: Array, n: int) -> Array:
    """[.., G, N / block] to [.., G, N]."""
    if x.shape[-1] == n:
        return x
    if x.shape[-1] == 1:
        return jnp.broadcast_to(x, (*x.shape[:-1], n))
    return jnp.repeat(x, n // x.shape[-1], axis=-1)
