"""Words to weights inside a TPU kernel.

`pltpu.bitcast` reads int32 words [R, N] as int4 [8 R, N] or int2 [16 R, N] in the order in which
the codes were packed, for nothing, but reads fields as two's complement and knows neither 1 bit nor
3. So the words are first rewritten, 8 to 16 codes an operation:

1. *Widening.* Planes narrower than the field that holds a whole code (2, 4 or 8 bits) are spread: a
   bitcast to int16 halves each word into two rows, and three or four shift-or-mask steps move the
   fields of its 16 bits apart to 32. Planes of one code are then joined by a shift and an or.
2. *Centring.* A constant is subtracted from every field at once, modulo the field, by the usual
   carry-free form ((x | H) - (D & ~H)) ^ ((x ^ ~D) & H), where H marks the top bits: codes 0 .. 15
   become -8 .. 7, ternary 0, 1, 2 becomes -1, 0, 1, and the bitcast reads what is meant. Codes of
   levels that lie half a step from 0 are doubled first, in a field with room for it.
"""

import dataclasses
from typing import Any, Final

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.experimental.pallas import tpu as pltpu

from kernels_pallas.activations import truncated
from kernels_pallas.problem import E2M1, Affine, Problem, Table, bfloat16_parts, integer_multiplier

_FIELD_DTYPES: Final = {2: jnp.int2, 4: jnp.int4, 8: jnp.int8}
_LANES: Final = 128
_SPREAD: Final = ((8, 0x00FF00FF), (4, 0x0F0F0F0F), (2, 0x33333333), (1, 0x55555555))


@dataclasses.dataclass(frozen=True)
class Centre:
    """How an affine code is read: `(field + offset) * step`, the field a two's complement integer.

    Attributes:
        width: Of the field, in bits: 2, 4 or 8.
        factor: What every code is multiplied by, within its field: 2 where levels lie half a step
            from 0, so that fields are odd numbers and nothing is missing; else 1, also for int8,
            whose sums along K make up for it exactly.
        subtract: Taken from every code then, modulo the field.
        offset: What is then still missing, in steps; 0 for integers and halves of them about 0.
        step: Distance of two fields.
    """

    width: int
    factor: int
    subtract: int
    offset: float
    step: float


def centre(problem: Problem) -> Centre:
    """The subtraction that leaves the smallest offset."""
    assert isinstance(problem.levels, Affine)
    zero, step = -problem.levels.low / problem.levels.step, problem.levels.step
    factor = 2 if _halves(problem) and problem.act != "int8" else 1
    width = field_width(problem.bits + factor - 1)
    half = 2 ** (width - 1)
    least = factor * (problem.codes - 1) + 1 - half
    subtract = int(min(max(np.round(zero * factor), least, 0), half))
    return Centre(width, factor, subtract, subtract - zero * factor, step / factor)


def _halves(problem: Problem) -> bool:
    """Whether levels lie half a step from 0, and a field has room for twice the code."""
    assert isinstance(problem.levels, Affine)
    zero = -problem.levels.low / problem.levels.step
    return (2 * zero) % 2 == 1 and problem.bits < 8 and not problem.zero_points


def field_width(bits: int) -> int:
    """Width of the field that a code of `bits` bits is read from: 2, 4 or 8."""
    return 2 if bits <= 2 else 4 if bits <= 4 else 8


def _repeated(value: int, width: int) -> np.int32:
    """A word whose every field of `width` bits is `value`."""
    pattern = sum((value % 2**width) << at for at in range(0, 32, width))
    return np.uint32(pattern).astype(np.int32)


def _widen(words: jax.Array, width: int) -> jax.Array:
    """Fields of `width` bits to fields of `2 * width`: int32 [R, N] to int32 [2 R, N]."""
    spread = pltpu.bitcast(words, jnp.int16).astype(jnp.int32) & np.int32(0xFFFF)
    for shift, mask in _SPREAD:
        if shift >= width:
            spread = (spread | (spread << np.int32(shift))) & np.int32(mask)
    return spread


def _subtract(words: jax.Array, value: int, width: int) -> jax.Array:
    """Subtracts `value` from every field, modulo `2**width`."""
    value %= 2**width
    if value == 0:
        return words
    top = _repeated(2 ** (width - 1), width)
    if value == 2 ** (width - 1):
        return words ^ top
    d = _repeated(value, width)
    return ((words | top) - (d & ~top)) ^ ((words ^ ~d) & top)


def centred_when_prepared(problem: Problem) -> bool:
    """Whether the subtraction can be done to the words at load: codes fill their fields.

    The same for every `act`, which a library does not know when it prepares words. So half steps
    wait for the kernel, which doubles them or does not.
    """
    if not isinstance(problem.levels, Affine) or _halves(problem):
        return False
    return problem.widths == (field_width(problem.bits),)


def centred(words: jax.Array, problem: Problem) -> jax.Array:
    """The words of a problem that is `centred_when_prepared`, codes replaced by signed fields."""
    return _subtract(words, centre(problem).subtract, problem.bits)


def uncentred(words: jax.Array, problem: Problem) -> jax.Array:
    """The inverse of `centred`."""
    return _subtract(words, -centre(problem).subtract, problem.bits)


def fields(planes: list[jax.Array], problem: Problem, is_centred: bool = False) -> jax.Array:
    """Codes as int2, int4 or int8 [K, N]; affine ones as `centre` says, if they are not so yet."""
    c = None if isinstance(problem.levels, Table) else centre(problem)
    target = field_width(problem.bits) if c is None else c.width
    words, low = None, 0
    for plane, width in zip(planes, problem.widths, strict=True):
        wide, now = plane, width
        while now < target:
            wide, now = _widen(wide, now), 2 * now
        wide = wide << np.int32(low) if low else wide
        words = wide if words is None else words | wide
        low += width
    assert words is not None
    if c is not None and not is_centred:
        words = words << np.int32(1) if c.factor == 2 else words
        words = _subtract(words, c.subtract, target)
    return pltpu.bitcast(words, _FIELD_DTYPES[target])


def twice_e2m1(words: jax.Array) -> jax.Array:
    """FP4 codes, int32 [R, N], to twice their values, int8 [8 R, N], eight codes an operation.

    With the bits s, e1, e0, m of a code, twice its magnitude is m, 2 + m, 4 + 2 m or 8 + 4 m for
    the exponents 0 to 3: four bits, each a Boolean function of three. The sign follows in 8-bit
    fields.
    """
    one = _repeated(1, 4)
    m, e0, e1 = words & one, (words >> np.int32(1)) & one, (words >> np.int32(2)) & one
    both, upper, lower = e1 & e0, e1 & ~e0, e0 & ~e1
    magnitude = m & ~e1
    magnitude |= (lower | (upper & m)) << np.int32(1)
    magnitude |= (upper | (both & m)) << np.int32(2)
    magnitude |= both << np.int32(3)
    # -0 stays 0: its complement would carry into the next field.
    sign = (words >> np.int32(3)) & (m | e0 | e1)
    magnitude, sign = _widen(magnitude, 4), _widen(sign, 4)
    complement = (sign << np.int32(8)) - sign  # 255 in the fields whose sign is set
    return pltpu.bitcast((magnitude ^ complement) + sign, jnp.int8)


def look_up(codes: jax.Array, values: tuple[float, ...]) -> jax.Array:
    """`values[codes]` in float32, for codes of 4 bits or fewer, which may be sign-extended.

    The TPU permutes lanes by an index of the same shape: the table lies in the lanes of a row.
    """
    k, n = codes.shape
    index = codes.astype(jnp.int32) & np.int32(len(values) - 1)
    lanes = lax.broadcasted_iota(jnp.int32, (1, _LANES), 1)
    row = jnp.zeros((1, _LANES), jnp.float32)
    for at, value in enumerate(values):
        row = jnp.where(lanes == at, np.float32(value), row)
    columns = []
    for start in range(0, n, _LANES):
        width = min(_LANES, n - start)
        table = jnp.broadcast_to(row[:, :width], (k, width))
        part = index[:, start : start + width]
        columns.append(jnp.take_along_axis(table, part, axis=1, mode="promise_in_bounds"))
    return jnp.concatenate(columns, axis=1)


def float_weights(
    planes: list[jax.Array], problem: Problem, dtype: Any, is_centred: bool
) -> list[jax.Array]:
    """Weights without offset, zero point, step and scale, as arrays [K, N] that sum to them.

    One array, but for tables that `dtype` cannot hold: bfloat16 takes up to three then. FP4 is
    twice its levels. Affine codes stay the integers that they are, int2, int4 or int8: the compiler
    widens them where it loads the MXU, in fewer bundles than a conversion in front of it takes.
    """
    if isinstance(problem.levels, Affine):
        codes = fields(planes, problem, is_centred)
        # Not every chip multiplies 2 bits; those that do take as many bundles for 4.
        return [codes.astype(jnp.int4) if codes.dtype == jnp.int2 else codes]
    if problem.levels.values == E2M1:
        return [twice_e2m1(planes[0]).astype(dtype)]
    rest = look_up(fields(planes, problem), problem.levels.values)
    count = (bfloat16_parts(problem) or 1) if dtype == jnp.bfloat16 else 1
    parts = []
    for _ in range(count - 1):
        high = truncated(rest)
        parts.append(high.astype(dtype))
        rest = rest - high
    return [*parts, rest.astype(dtype)]


@dataclasses.dataclass(frozen=True)
class Integers:
    """int8 weights: level = (a * weight + b) / multiplier.

    Attributes:
        a: Factor of the weight.
        b: Constant.
        multiplier: The power of two that makes all levels integers.
    """

    a: int
    b: int
    multiplier: int


def integers(problem: Problem) -> Integers:
    """How the int8 weights of `integer_weights` stand to the levels."""
    multiplier = integer_multiplier(problem)
    assert multiplier is not None
    if isinstance(problem.levels, Table):
        return Integers(1, 0, multiplier)
    c = centre(problem)
    return Integers(round(multiplier * c.step), round(multiplier * c.step * c.offset), multiplier)


def integer_weights(planes: list[jax.Array], problem: Problem, is_centred: bool) -> jax.Array:
    """int8 [K, N]; see `integers`."""
    if isinstance(problem.levels, Table) and problem.levels.values == E2M1:
        return twice_e2m1(planes[0])
    if isinstance(problem.levels, Table):
        multiplier = integers(problem).multiplier
        scaled = Table(tuple(value * multiplier for value in problem.levels.values))
        chosen = look_up(fields(planes, problem), scaled.values)
        return chosen.astype(jnp.int32).astype(jnp.int8)
    return fields(planes, problem, is_centred).astype(jnp.int8)
