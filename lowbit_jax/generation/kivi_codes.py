"""The packed part of a KIVI cache: codes of groups, each with its own minimum and scale.

    scale = (max x - min x) / (2**bits - 1),   code = round((x - min x) / scale),
    x^ = code * scale + min x

Scale and minimum are rounded to float16 before codes are chosen. The minimum is a number and not an
integer zero point, and zero is no level in general: that is what the method asks of two bits.
"""

import dataclasses
from typing import Any, Final

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float, Float32, Int32, UInt8

from lowbit_jax import packing
from lowbit_jax.blocks import divided, pinned, rounded_cast
from lowbit_jax.rounding import round_minifloat
from lowbit_jax.scale_formats import FLOAT16

_HALF: Final = np.float16


@dataclasses.dataclass(frozen=True)
class KiviSpec:
    """How a KIVI cache holds keys and values.

    Attributes:
        bits: Width of one code, in bits: 1, 2, 4 or 8.
        group: Elements that share a scale and a minimum: positions of keys, channels of values.
        window: Recent positions in float, the paper's R; a multiple of `group`.

    Raises:
        ValueError: Another width, or a window that is not made of whole groups and whole words.
    """

    bits: int
    group: int = 32
    window: int = 128

    def __post_init__(self):
        if self.bits not in (1, 2, 4, 8):
            raise ValueError(f"KiviSpec: bits={self.bits} must be 1, 2, 4 or 8.")
        codes = 32 // self.bits
        if self.group < 1 or self.window < 1 or self.window % self.group or self.window % codes:
            raise ValueError(
                f"KiviSpec: window={self.window} must be a multiple of group={self.group}, since "
                f"keys leave it in whole groups, and of {codes}, since a word holds so many codes "
                f"of {self.bits} bits."
            )


def affine_codes(
    x: Float[Array, "..."], bits: int, axis: int
) -> tuple[UInt8[Array, "..."], Float32[Array, "..."], Float32[Array, "..."]]:
    """Codes of groups that run along `axis`, with scale and minimum of length 1 there.

    Nearest, ties to even, saturating. Scale and minimum are float16 numbers, in float32; a group of
    equal elements has the smallest scale there is, and codes of 0.
    """
    x = x.astype(jnp.float32)
    low, high = jnp.min(x, axis, keepdims=True), jnp.max(x, axis, keepdims=True)
    scale = pinned(FLOAT16.round(pinned(high - low) * np.float32(1 / (2**bits - 1))))
    low = round_minifloat(low, mantissa_bits=10, min_exponent=-14, largest=FLOAT16.largest)
    levels = jnp.round(divided(x - low, scale))
    return jnp.clip(levels, 0.0, np.float32(2**bits - 1)).astype(jnp.uint8), scale, low


class _Codes(nnx.Module):
    """What is packed, in variables of the kind `nnx.Cache`."""

    @property
    def nbytes(self) -> int:
        """Bytes of words, scales and minima."""
        leaves = jax.tree.leaves(nnx.state(self, nnx.Cache))
        return sum(int(np.prod(leaf.shape)) * leaf.dtype.itemsize for leaf in leaves)


class KeyCodes(_Codes):
    """Packed keys: groups of positions of one channel. `packed_attention.Rows`.

    Attributes:
        words: int32 [batch, positions * bits / 32, channels], channels = kv_heads * head_dim.
        scale, low: float16 [batch, positions / group, channels].
    """

    def __init__(self, batch: int, positions: int, heads: tuple[int, int], dtype, spec: KiviSpec):
        self.spec, self.positions, self.heads, self.dtype = spec, positions, heads, dtype
        channels = heads[0] * heads[1]
        groups = (batch, positions // spec.group, channels)
        self.words = nnx.Cache(jnp.zeros((batch, positions * spec.bits // 32, channels), jnp.int32))
        self.scale = nnx.Cache(jnp.zeros(groups, _HALF))
        self.low = nnx.Cache(jnp.zeros(groups, _HALF))

    @property
    def unit(self) -> int:
        """Positions of whole groups and whole words."""
        return int(np.lcm(self.spec.group, 32 // self.spec.bits))

    def decode(
        self, start: Int32[Array, ""] | int, count: int
    ) -> tuple[Float[Array, "batch {count} kv_heads head_dim"], None]:
        """See `packed_attention.Rows`: nothing is left to multiply by."""
        bits, group = self.spec.bits, self.spec.group
        words = rows(self.words[...], start * bits // 32, count * bits // 32)
        codes = packing.unpack(words, bits)
        batch, _, channels = codes.shape
        split = codes.reshape(batch, count // group, group, channels).astype(jnp.float32)
        scale = rows(self.scale[...], start // group, count // group)[:, :, None]
        low = rows(self.low[...], start // group, count // group)[:, :, None]
        x = split * scale.astype(jnp.float32) + low.astype(jnp.float32)
        return rounded_cast(x.reshape(batch, count, *self.heads), self.dtype), None

    def write(
        self,
        line: Float[Array, "batch n kv_heads head_dim"],
        block: Int32[Array, ""],
        complete: Int32[Array, ""],
    ) -> None:
        """Packs blocks of `window` positions.

        Args:
            line: n positions, a multiple of `window`, the first of them at `block * window`.
            block: Where they go.
            complete: How many blocks of the line are; the others are not written.
        """
        spec, (batch, n, *_) = self.spec, line.shape

        def packed(line: Array) -> tuple[Array, ...]:
            split = line.reshape(batch, n // spec.group, spec.group, -1)
            codes, scale, low = affine_codes(split, spec.bits, axis=2)
            words = packing.pack(codes.reshape(batch, n, -1), spec.bits)
            return words, scale[:, :, 0].astype(_HALF), low[:, :, 0].astype(_HALF)

        def nothing(line: Array) -> tuple[Array, ...]:
            shapes = jax.eval_shape(packed, line)
            return tuple(jnp.zeros(shape.shape, shape.dtype) for shape in shapes)

        # Of `window` single tokens, one completes a block.
        fresh = jax.lax.cond(complete > 0, packed, nothing, line)
        blocks = self.positions // spec.window
        index = jnp.arange(n // spec.window)
        index = jnp.where(index < complete, block + index, blocks)  # behind the end: dropped
        for held, new in zip((self.words, self.scale, self.low), fresh, strict=True):
            split = held[...].reshape(batch, blocks, -1, held.shape[-1])
            new = new.reshape(batch, n // spec.window, *split.shape[2:])
            held[...] = split.at[:, index].set(new, mode="drop").reshape(held.shape)


class ValueCodes(_Codes):
    """Packed values: groups of channels of one position. `packed_attention.Rows`.

    Attributes:
        words: int32 [batch, positions, kv_heads, ceil32(head_dim) * bits / 32].
        scale, low: float16 [batch, positions, kv_heads, groups].
    """

    def __init__(self, batch: int, positions: int, heads: tuple[int, int], dtype, spec: KiviSpec):
        self.spec, self.positions, self.heads, self.dtype = spec, positions, heads, dtype
        lead = (batch, positions, heads[0])
        self.group = min(spec.group, heads[1])
        if heads[1] % self.group:
            raise ValueError(
                f"kivi: heads of width {heads[1]} do not split into groups of {self.group} "
                f"({heads[1]} = {heads[1] // self.group} * {self.group} + "
                f"{heads[1] % self.group}), which values are quantized in. Use "
                "cache_format='int4', which has one scale per head."
            )
        words = packing.word_count(spec.bits, heads[1])
        self.words = nnx.Cache(jnp.zeros((*lead, words), jnp.int32))
        self.scale = nnx.Cache(jnp.zeros((*lead, heads[1] // self.group), _HALF))
        self.low = nnx.Cache(jnp.zeros((*lead, heads[1] // self.group), _HALF))

    @property
    def unit(self) -> int:
        """A position stands alone."""
        return 1

    def decode(
        self, start: Int32[Array, ""] | int, count: int
    ) -> tuple[Float[Array, "batch {count} kv_heads head_dim"], None]:
        """See `packed_attention.Rows`: nothing is left to multiply by."""
        words = rows(self.words[...], start, count)[..., None]
        codes = packing.unpack_planes((words,), self.spec.bits, self.heads[1])
        split = codes.reshape(*codes.shape[:3], -1, self.group).astype(jnp.float32)
        scale = rows(self.scale[...], start, count)[..., None].astype(jnp.float32)
        low = rows(self.low[...], start, count)[..., None].astype(jnp.float32)
        return rounded_cast((split * scale + low).reshape(codes.shape[:-1]), self.dtype), None

    def write(
        self, fresh: Float[Array, "batch n kv_heads head_dim"], first: Int32[Array, ""]
    ) -> None:
        """Packs n positions, at `first` and behind; those below 0 are not written."""
        split = fresh.reshape(*fresh.shape[:3], -1, self.group)
        codes, scale, low = affine_codes(split, self.spec.bits, axis=-1)
        (words,) = packing.pack_planes(codes.reshape(*fresh.shape, 1), self.spec.bits)
        index = first + jnp.arange(fresh.shape[1])
        index = jnp.where(index < 0, self.positions, index)  # behind the end: dropped
        packed = (words[..., 0], scale[..., 0].astype(_HALF), low[..., 0].astype(_HALF))
        for held, new in zip((self.words, self.scale, self.low), packed, strict=True):
            held[...] = held[...].at[:, index].set(new, mode="drop")


def rows(array: Array, start: Any, count: int) -> Array:
    """`count` positions from `start` on, along the second axis."""
    return jax.lax.dynamic_slice_in_dim(array, start, count, axis=1)
