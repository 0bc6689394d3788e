"""Words to weights that stay in registers: the instructions the tensor core's rate asks for.

The tensor core takes its 64-row operand from registers too. There each thread holds neighbours
along K, two of 16 bits or four of 8 in a register, and a block of words loaded in that layout puts
the words of the neighbours into one thread. One or two permutations of their bytes bring the fields
of a shift side by side, and then

    (lanes >> shift) & mask | 0x4300_4300

is the pair 128 + c in bfloat16, exact for c < 128, of which one subtraction leaves the levels:
three instructions for two weights, against seven by way of float32 and shared memory. For int8 the
same subtraction is made in bytes, ((c | 0x80) - d) ^ 0x80, which borrows from no neighbour.

The instructions stand outside of what Pallas can interpret. What is proven without a device is that
they compile, and that the words, the pipeline and the scales are those of the path through shared
memory. Hence nothing chooses this path by itself; `GpuConfig(decode="registers")` does.
"""

from collections.abc import Callable
from typing import Any, Final

import jax
import jax.numpy as jnp
import numpy as np

# Mosaic's own dialects have no public name yet.
from jax._src.lib.mlir import ir
from jax._src.lib.mlir.dialects import arith, llvm, vector
from jax.experimental.mosaic import gpu as mosaic
from jax.experimental.pallas import mosaic_gpu as plgpu

from kernels_pallas.problem import Affine, Problem, integer_multiplier

_EXPONENT: Final = 0x4300  # of bfloat16's 128
_PAIRS: Final = 0x00010001
_BYTES: Final = 0x01010101


def why_not(problem: Problem, chunk: int) -> str | None:
    """Why the weights cannot be made this way, or None if they can."""
    if problem.act == "int8" and chunk < 64:
        return (
            f"int8 from registers needs lines of 64 elements of x, not {chunk}: GpuConfig(chunk=64)"
        )
    if problem.act == "fp8" or problem.zero_points or not isinstance(problem.levels, Affine):
        return "registers hold affine levels without zero points, for 16-bit or int8 x"
    if len(problem.widths) > 1 or problem.bits > 4:
        return f"registers hold codes of 1, 2 and 4 bits, not {problem.bits}"
    return None


def layout(problem: Problem) -> Any:
    """How the words have to be loaded: as the weights of this type are held."""
    return plgpu.Layout.WGMMA_8BIT if problem.act == "int8" else plgpu.Layout.WGMMA


def weights(problem: Problem, chunk: int, index: int) -> Callable[[Any], jax.Array]:
    """The function from a block of words, int32 [64, C], to the weights [64, C] of one field.

    Args:
        problem: The static part; `why_not` has nothing against it.
        chunk: C.
        index: The chunk within the tile, of which the field is the remainder.

    Returns:
        Weights as bfloat16, without the step of the levels, or int8, times `integer_multiplier`.
    """
    at = index % (32 // problem.bits) * problem.bits
    integer = problem.act == "int8"
    one = _bytes if integer else _pairs
    held = mosaic.WGMMA_LAYOUT_8BIT if integer else mosaic.WGMMA_LAYOUT
    dtype = jnp.dtype(jnp.int8 if integer else jnp.bfloat16)

    @plgpu.inline_mgpu(
        arg_types=(layout(problem),),
        return_type=plgpu.ShapeDtypeStruct((64, chunk), dtype, layout=layout(problem)),
    )
    def decode(_: Any, words: Any) -> Any:
        out = np.empty(words.registers.shape, dtype=object)
        for place, register in np.ndenumerate(words.registers):
            count = ir.VectorType(register.type).shape[0]
            lanes = [vector.extract(register, [], [lane]) for lane in range(count)]
            out[place] = one(lanes, at, problem)
        return mosaic.FragmentedArray(
            _registers=out, _layout=held, _is_signed=True if integer else None
        )

    return decode


def _pairs(words: list[Any], at: int, problem: Problem) -> Any:
    """Two words to the bfloat16 pair of the fields at bit `at`."""
    assert isinstance(problem.levels, Affine)
    offset = -problem.levels.low / problem.levels.step
    whole = float(np.floor(offset))
    lanes = _permute(words[0], words[1], 0x7632 if at >= 16 else 0x5410)
    lanes = _shifted(lanes, at % 16)
    mask = (2**problem.bits - 1) * _PAIRS
    value = _and_or(lanes, mask, _EXPONENT * _PAIRS)
    for constant in (128.0 + whole, offset - whole):
        if constant:
            lane = int(np.asarray(constant, jnp.bfloat16).view(np.uint16))
            value = _subtract_pairs(value, lane * _PAIRS)
    pair = ir.VectorType.get((2,), ir.BF16Type.get())
    return mosaic.utils.bitcast(value, pair)


def _bytes(words: list[Any], at: int, problem: Problem) -> Any:
    """Four words to the int8 quadruple of the fields at bit `at`."""
    assert isinstance(problem.levels, Affine)
    multiplier = integer_multiplier(problem) or 1
    step, low = round(problem.levels.step * multiplier), round(problem.levels.low * multiplier)
    byte, shift = divmod(at, 8)
    # Byte b of the first and of the second word; then of all four.
    halves = [_permute(a, b, byte | (4 + byte) << 4) for a, b in (words[:2], words[2:])]
    lanes = _shifted(_permute(halves[0], halves[1], 0x5410), shift)
    top = 0x80 * _BYTES
    mask = (2**problem.bits - 1) * _BYTES
    if step == 1:
        value = _and_or(lanes, mask, top)
    else:
        scaled = arith.muli(_and_or(lanes, mask, 0), _constant(step))
        value = arith.ori(scaled, _constant(top))
    value = arith.subi(value, _constant(-low * _BYTES))
    value = arith.xori(value, _constant(top))
    four = ir.VectorType.get((4,), ir.IntegerType.get_signless(8))
    return mosaic.utils.bitcast(value, four)


def _i32() -> Any:
    return ir.IntegerType.get_signless(32)


def _constant(value: int) -> Any:
    signed = int(np.uint32(value % 2**32).view(np.int32))
    return arith.constant(_i32(), ir.IntegerAttr.get(_i32(), signed))  # type: ignore[arg-type]


def _shifted(value: Any, by: int) -> Any:
    return arith.shrui(value, _constant(by)) if by else value


def _permute(low: Any, high: Any, selector: int) -> Any:
    """Byte i of the result is byte `selector >> 4 * i & 7` of the eight of low and high."""
    return llvm.inline_asm(_i32(), [low, high], f"prmt.b32 $0, $1, $2, 0x{selector:x};", "=r,r,r")


def _and_or(value: Any, mask: int, bits: int) -> Any:
    """`value & mask | bits`, in one instruction."""
    text = f"lop3.b32 $0, $1, 0x{mask:x}, 0x{bits:x}, 0xea;"
    return llvm.inline_asm(_i32(), [value], text, "=r,r")


def _subtract_pairs(value: Any, constant: int) -> Any:
    """Both bfloat16 lanes of `value` minus those of a constant."""
    text = f"{{ .reg .b32 c; mov.b32 c, 0x{constant:08x}; sub.bf16x2 $0, $1, c; }}"
    return llvm.inline_asm(_i32(), [value], text, "=r,r")
