"""Words to several weights at once: two bfloat16 numbers, or four int8, of one 32-bit register.

The fields of a word are ordered (`layout.py`) so that one shift and one mask of a word leave codes
of neighbouring chunks in its halves, or in its bytes. With

    (word >> shift) & mask | 0x4300_4300

the halves are 128 + c in bfloat16, exact for c < 128, of which one subtraction leaves the levels:
three instructions for two weights, against seven by way of float32. For int8 the same subtraction
is made in bytes, ((c | 0x80) - d) ^ 0x80, which borrows from no neighbour; and where it would take
half of the range away, as of two's complement, no subtraction is needed: c moved to the top of its
byte, its highest bit inverted, is the level times a power of two (`raised`).

A block [64, C] of words so makes a block [64, 2 C] or [64, 4 C] of weights, whose columns are those
of the tensor core's layout: a thread holds neighbours along K in one register, and neighbouring
words in two. x has to be in the same order (`arranged`). That a register of int32 is one of two or
four weights is all that Pallas cannot say; it is said to Mosaic (`_parted`), and where a kernel is
interpreted, by a transposition that does the same.
"""

from collections.abc import Callable
from typing import Any, Final

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

# Mosaic's own dialects have no public name yet.
from jax._src.lib.mlir import ir
from jax._src.lib.mlir.dialects import llvm, vector
from jax.experimental.mosaic import gpu as mosaic
from jax.experimental.pallas import mosaic_gpu as plgpu

from kernels_pallas.gpu.layout import BYTES, shift_of
from kernels_pallas.problem import WORD, Affine, Problem, integer_multiplier

_EXPONENT: Final = 0x4300  # of bfloat16's 128
_TOP: Final = 0x80
_JOINED: Final = {None: 2, "int8": 4}


def why_not(problem: Problem, chunk: int) -> str | None:
    """Why weights of this problem are made one by one, or None if several are made at once."""
    if problem.act not in _JOINED or not isinstance(problem.levels, Affine):
        return "weights are made in pairs of affine levels, for 16-bit or int8 x"
    if problem.bits > 6 or problem.levels.low > 0 or _highest(problem) >= _TOP:
        return f"weights are made in pairs of codes of up to 6 bits, not {problem.bits}"
    length = _JOINED[problem.act] * chunk
    if problem.groups > 1 and problem.group % length:
        return f"{length} elements along K are made at once, which groups of {problem.group} part"
    return None


def count(problem: Problem, chunk: int) -> int:
    """Chunks whose weights are made at once: 1, 2 or 4."""
    return 1 if why_not(problem, chunk) else _JOINED[problem.act]


def raised(problem: Problem, chunk: int) -> int:
    """What weights are multiplied by, a power of two, beside `integer_multiplier`."""
    return 2 ** (8 - problem.bits) if count(problem, chunk) == 4 and _centred(problem) else 1


def arranged(x: jax.Array, problem: Problem, chunk: int) -> jax.Array:
    """x [M, K], K whole tiles, to the order of the weights: [K / L, M, L] for L = count * chunk."""
    m, together = x.shape[0], count(problem, chunk)
    if together == 1:
        return x.reshape(m, -1, chunk).swapaxes(0, 1)
    # Word 8 c + 2 q + b is the b-th of thread q in the c-th tile of eight.
    x = x.reshape(m, -1, together, chunk // 8, 4, 2)
    if together == 4:
        x = x[:, :, np.asarray(BYTES)]  # byte by byte of a word
    return x.transpose(1, 0, 3, 5, 4, 2).reshape(-1, m, together * chunk)


def weights(
    planes: list[jax.Array],
    zero: jax.Array | None,
    problem: Problem,
    index: int,
    *,
    interpret: bool,
) -> jax.Array:
    """Weights [64, L] of the chunks from `index` on, bfloat16 or int8, in the order of `arranged`.

    Args:
        planes: For each plane the block of words that holds the chunks, int32 [64, C].
        zero: Zero points [64], float32 or int32, or None.
        problem: The static part; `why_not` has nothing against it.
        index: The first chunk within the tile, a multiple of `count`.
        interpret: Whether the interpreter runs the kernel.

    Returns:
        bfloat16 weights without the step of the levels; or int8, times `integer_multiplier` and
        `raised`.
    """
    parted = _transposed if interpret else _parted
    if problem.act == "int8":
        return parted(_bytes(planes, zero, problem, index, interpret), jnp.int8)
    assert isinstance(problem.levels, Affine)
    pairs = _fields(planes, problem, index, _lanes(_EXPONENT, 2), interpret)
    pairs = parted(pairs, jnp.bfloat16)
    offset = -problem.levels.low / problem.levels.step
    whole = float(np.floor(offset))
    for constant in (128.0 + whole, offset - whole):
        pairs = pairs - jnp.bfloat16(constant) if constant else pairs
    if zero is None:
        return pairs
    return pairs - lax.broadcast_in_dim(zero.astype(jnp.bfloat16), pairs.shape, [0])


def _fields(
    planes: list[jax.Array], problem: Problem, index: int, constant: int, interpret: bool
) -> jax.Array:
    """Codes in the halves or bytes of int32 [64, C], with the bits of a constant above them."""
    joined, low = None, 0
    for plane, width in zip(planes, problem.widths, strict=True):
        part = _shifted(plane, shift_of(width, index) - low)
        mask = _lanes((2**width - 1) << low, _JOINED[problem.act])
        if joined is None:
            joined = _masked(part, mask, "or", constant, interpret)
        else:
            joined = joined | (part & _signed(mask))
        low += width
    assert joined is not None
    return joined


def _bytes(
    planes: list[jax.Array], zero: jax.Array | None, problem: Problem, index: int, interpret: bool
) -> jax.Array:
    """Weights in the bytes of int32 [64, C]."""
    assert isinstance(problem.levels, Affine)
    top = _lanes(_TOP, 4)
    if _centred(problem):
        width = problem.bits
        part = _shifted(planes[0], shift_of(width, index) + width - 8)
        return _masked(part, _lanes((2**width - 1) << 8 - width, 4), "xor", top, interpret)
    multiplier = integer_multiplier(problem) or 1
    step, low = round(problem.levels.step * multiplier), round(problem.levels.low * multiplier)
    value = _fields(planes, problem, index, top if step == 1 else 0, interpret)
    value = value if step == 1 else value * np.int32(step) | _signed(top)
    value = value - _signed(_lanes(-low, 4)) if low else value
    if zero is not None:
        zeros = lax.broadcast_in_dim(zero * _signed(_lanes(multiplier, 4)), value.shape, [0])
        value = value - zeros
    return value ^ _signed(top)


def _masked(words: jax.Array, mask: int, join: str, constant: int, interpret: bool) -> jax.Array:
    """`(words & mask) | constant`, or ^: one instruction, which ptxas makes of two constants only
    where it is named; of two operations it makes one with a move of the mask beside it.
    """
    if interpret:
        masked, bits = words & _signed(mask), _signed(constant)
        return masked | bits if join == "or" else masked ^ bits
    table = {"or": 0xEA, "xor": 0x6A}[join]
    text = f"lop3.b32 $0, $1, 0x{mask:x}, 0x{constant:x}, 0x{table:x};"

    @plgpu.inline_mgpu(
        arg_types=(plgpu.Layout.WGMMA,),
        return_type=plgpu.ShapeDtypeStruct(words.shape, words.dtype, layout=plgpu.Layout.WGMMA),
    )
    def mask_words(_: Any, words: Any) -> Any:
        word, out = ir.IntegerType.get_signless(32), np.empty_like(words.registers)
        for place, pair in np.ndenumerate(words.registers):
            masked = [
                llvm.inline_asm(word, [vector.extract(pair, [], [b])], text, "=r,r")
                for b in range(2)
            ]
            out[place] = vector.from_elements(pair.type, masked)
        return mosaic.FragmentedArray(_registers=out, _layout=words.layout, _is_signed=True)

    return mask_words(words)


def _centred(problem: Problem) -> bool:
    """Whether codes are two's complement with the highest bit inverted, in one plane."""
    half = Affine(low=-(2.0 ** (problem.bits - 1)))
    return (
        isinstance(problem.levels, Affine)
        and (problem.levels.low, problem.levels.step) == (half.low, half.step)
        and len(problem.widths) == 1
        and not problem.zero_points
    )


def _highest(problem: Problem) -> int:
    """What the highest code is before anything is subtracted; a bit above it is borrowed from."""
    assert isinstance(problem.levels, Affine)
    multiplier = integer_multiplier(problem) or 1 if problem.act == "int8" else 1
    step = problem.levels.step * multiplier if problem.act == "int8" else 1
    return (2**problem.bits - 1) * round(step)


def _transposed(words: jax.Array, dtype: Any) -> jax.Array:
    """[64, C] words to [64, L] weights, without threads: what `_parted` does."""
    rows, chunk = words.shape
    lanes = lax.bitcast_convert_type(words, dtype).reshape(rows, chunk // 8, 4, 2, -1)
    return lanes.transpose(0, 1, 3, 2, 4).reshape(rows, -1)


def _parted(words: jax.Array, dtype: Any) -> jax.Array:
    """The same without moving anything: the columns of words that a thread holds are two registers
    of weights.
    """
    rows, chunk = words.shape
    lanes = 4 // jnp.dtype(dtype).itemsize
    layout = plgpu.Layout.WGMMA_8BIT if lanes == 4 else plgpu.Layout.WGMMA
    return _relabel(rows, chunk, lanes, jnp.dtype(dtype), layout)(words)


def _relabel(
    rows: int, chunk: int, lanes: int, dtype: Any, layout: Any
) -> Callable[..., jax.Array]:
    @plgpu.inline_mgpu(
        arg_types=(plgpu.Layout.WGMMA,),
        return_type=plgpu.ShapeDtypeStruct((rows, lanes * chunk), dtype, layout=layout),
    )
    def relabel(_: Any, words: Any) -> Any:
        held = mosaic.WGMMA_LAYOUT_8BIT if lanes == 4 else mosaic.WGMMA_LAYOUT
        element = ir.IntegerType.get_signless(8) if lanes == 4 else ir.BF16Type.get()
        register = ir.VectorType.get((lanes,), element)
        out = np.empty(held.registers_shape((rows, lanes * chunk)), dtype=object)
        for place, pair in np.ndenumerate(words.registers):
            for b in range(2):
                word = vector.extract(pair, [], [b])
                at = (place[0], 2 * place[1] + b, *place[2:])
                out[at] = mosaic.utils.bitcast(word, register)
        return mosaic.FragmentedArray(
            _registers=out, _layout=held, _is_signed=True if lanes == 4 else None
        )

    return relabel


def _lanes(value: int, lanes: int) -> int:
    """`value` in every half or byte of a word."""
    return sum(value << at for at in range(0, WORD, WORD // lanes))


def _signed(value: int) -> np.int32:
    return np.uint32(value % 2**WORD).view(np.int32)


def _shifted(words: jax.Array, right: int) -> jax.Array:
    if right == 0:
        return words
    return (
        lax.shift_right_logical(words, np.int32(right)) if right > 0 else words << np.int32(-right)
    )
