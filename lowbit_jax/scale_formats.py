"""How scales are stored: float formats, powers of two, dyadic numbers."""

import dataclasses
from typing import Any, Final, Literal

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int32

from lowbit_jax.rounding import exp2, exponent_of, round_minifloat


@dataclasses.dataclass(frozen=True)
class ScaleFormat:
    """How a scale is stored; scales are rounded to it in the forward pass.

    Rounding: nearest, ties to even, saturating, never to zero (the smallest positive value instead,
    but for e4m3, whose zero means that every code of the block is zero); e8m0 by `rounding`.

    Attributes:
        name: What is stored; with `rounding` the registry key.
        dtype: What a scale is stored as.
        mantissa_bits: Stored bits of the mantissa.
        min_exponent: Exponent of the smallest normal number.
        largest: Largest scale.
        smallest: Smallest scale; 0 where a zero is kept.
        rounding: "nearest", or for powers of two "floor" (OCP MX v1.0, 6.3: the largest magnitude
            of a block may saturate), "ceil" (none saturates) or "even" (the largest magnitude is
            rounded to the format's mantissa, ties to even, and its exponent taken).
    """

    name: str
    dtype: Any
    mantissa_bits: int
    min_exponent: int
    largest: float
    smallest: float
    rounding: Literal["nearest", "floor", "ceil", "even"] = "nearest"

    @property
    def key(self) -> str:
        """Registry key, written to checkpoints."""
        directed = self.rounding not in ("nearest", "floor")
        return f"{self.name}_{self.rounding}" if directed else self.name

    def round(self, scale: Float[Array, "*n"]) -> Float[Array, "*n"]:
        """The nearest scale (e8m0: the next lower or higher) that can be stored, in float32.

        "even" looks at the array and not at the scale: `calibrate.absmax` rounds the magnitude
        first, and its exponent is taken here, as by "floor".
        """
        if self.name == "float32":
            return jnp.maximum(scale, np.float32(self.smallest))
        if self.rounding != "nearest":
            scale = jnp.maximum(scale, np.float32(self.smallest))
            lower = _floor_power_of_two(scale)
            if self.rounding == "ceil":
                lower = jnp.where(scale > lower, lower * np.float32(2), lower)
            return jnp.minimum(lower, np.float32(self.largest))
        rounded = round_minifloat(
            scale,
            mantissa_bits=self.mantissa_bits,
            min_exponent=self.min_exponent,
            largest=self.largest,
        )
        return jnp.maximum(rounded, np.float32(self.smallest))

    def store(self, scale: Float[Array, "*n"]) -> Array:
        """A scale that `round` returned, in the stored dtype: exact."""
        return scale.astype(self.dtype)


def _floor_power_of_two(v: Float[Array, "*n"]) -> Float[Array, "*n"]:
    bits = v.view(jnp.int32) & jnp.int32(0x7F800000)
    return jnp.where(jnp.isnan(v), v, bits.view(jnp.float32))


# A scale times the smallest value of a format must be a normal number: subnormal ones are flushed
# to zero by some programs and kept by others.
_SMALLEST: Final = 2.0**-119
FLOAT32: Final = ScaleFormat("float32", np.dtype("float32"), 23, -126, 3.4028235e38, _SMALLEST)
BFLOAT16: Final = ScaleFormat(
    # The exponent is that of the smallest number whose last place is a normal float32.
    "bfloat16",
    jnp.dtype("bfloat16"),
    7,
    -119,
    3.3895313892515355e38,
    _SMALLEST,
)
FLOAT16: Final = ScaleFormat("float16", np.dtype("float16"), 10, -14, 65504.0, 2.0**-24)
E8M0: Final = ScaleFormat(
    "e8m0", jnp.dtype("float8_e8m0fnu"), 0, -126, 2.0**127, _SMALLEST, rounding="floor"
)
E8M0_CEIL: Final = dataclasses.replace(E8M0, rounding="ceil")
E8M0_EVEN: Final = dataclasses.replace(E8M0, rounding="even")
E4M3: Final = ScaleFormat("e4m3", jnp.dtype("float8_e4m3fn"), 3, -6, 448.0, 0.0)
# b / 2**c of integers, so that a requantization is a product and a shift (HAWQ-v3,
# arXiv:2011.10680); b takes 16 bits, c up to 46.
DYADIC16: Final = ScaleFormat("dyadic16", np.dtype("float32"), 15, -31, 65535.0, 2.0**-46)
SCALE_FORMATS: Final = {
    f.key: f for f in (FLOAT32, BFLOAT16, FLOAT16, E8M0, E4M3, E8M0_CEIL, E8M0_EVEN, DYADIC16)
}


def dyadic_parts(scale: Float[Array, "*n"]) -> tuple[Int32[Array, "*n"], Int32[Array, "*n"]]:
    """Integers b in [0, 2**16) and c in [0, 46] of a DYADIC16 scale: exactly b / 2**c.

    Args:
        scale: float32, as `DYADIC16.round` returned it.
    """
    shift = jnp.clip(DYADIC16.mantissa_bits - exponent_of(scale), 0, 46)
    return (scale * exp2(shift)).astype(jnp.int32), shift
