"""x @ W of a packed matrix on the CPU, for every width of codes."""

import dataclasses
import math
from typing import Literal

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from kernels_cpu.library import TARGET, instruction_set

PANEL = 16
"""Outputs that the kernels compute together: N is padded to a multiple."""
_WIDTHS = {1: (1,), 2: (2,), 3: (2, 1), 4: (4,), 5: (4, 1), 6: (4, 2), 7: (4, 2, 1), 8: (8,)}
_LARGEST_INTEGER = 64  # two products of two with 127 fit 16 bits


@dataclasses.dataclass(frozen=True)
class Codes:
    """What the codes of a matrix [K, N] stand for; static.

    Attributes:
        bits: Of a code, 1 to 8.
        step: A code stands for `code * step + low`, less its zero point if there is one..
        low: ..
        table: .. or for `table[code]`, of 2**bits values.
        group: Elements of K that share a scale; None: all.
    """

    bits: int
    step: float = 1.0
    low: float = 0.0
    table: tuple[float, ...] | None = None
    group: int | None = None


def unsupported(codes: Codes, act: Literal["int8"] | None) -> str | None:
    """Why there is no kernel for such codes; None if there is one."""
    if codes.bits not in _WIDTHS:
        return f"codes of {codes.bits} bits"
    per_word = 32 // min(_WIDTHS[codes.bits])
    if codes.group is not None and codes.group % per_word:
        return f"groups of {codes.group} straddle words of {per_word} codes"
    if act is not None and _integers(codes) is None:
        return f"int8 activations: the values of {codes.bits}-bit codes are not integers"
    return None


def panels(words: Array) -> Array:
    """A plane of words [rows, N] in the kernels' own order [ceil(N / 16), rows, 16]."""
    padded = _padded(words)
    return padded.reshape(words.shape[0], -1, PANEL).swapaxes(0, 1)


def unpanels(words: Array, n: int) -> Array:
    """The inverse of `panels`."""
    return words.swapaxes(0, 1).reshape(words.shape[1], -1)[:, :n]


def matmul(
    x: Array,
    words: tuple[Array, ...],
    scale: Array,
    zero_point: Array | None,
    *,
    codes: Codes,
    n: int,
    act: Literal["int8"] | None = None,
    instructions: str = "",
) -> Array:
    """x @ W, where W[k, n] = (value of its code - zero point) * scale.

    Deterministic: the result depends neither on the number of threads nor on the other rows.

    Args:
        x: float32 [M, K].
        words: Planes of 4, 2 and 1 bits, widest first (8: one plane of 8): int32 [rows, N], codes
            consecutive along K from the lowest bits up and K padded to a multiple of 32; or each
            as `panels` gives it.
        scale: float32 [G, N].
        zero_point: uint8 [G, N] or None.
        codes: What the codes stand for.
        n: N.
        act: "int8" rounds every row of x to `rint(x * (127 / absmax))` and sums integers, exactly;
            a row with a NaN or an infinity gives NaN. None: float32.
        instructions: An instruction set instead of the best one: "avx512", "avx2", "neon" or
            "portable".

    Returns:
        float32 [M, N].

    Raises:
        ValueError: Operands that do not fit each other.
        NotImplementedError: No library, or no kernel for such codes; the message says why.
    """
    instruction_set()
    _check(x, words, scale, zero_point, codes, n)
    if reason := unsupported(codes, act):
        raise NotImplementedError(f"CPU kernels: {reason}.")
    if words[0].ndim == 2:
        words = tuple(_padded(plane) for plane in words)
    if zero_point is None:
        zero_point = jnp.zeros((0, 0), jnp.uint8)
    shift, low, unit, table = _integers(codes) or (0, 0, 1.0, ())
    call = jax.ffi.ffi_call(TARGET, jax.ShapeDtypeStruct((x.shape[0], n), jnp.float32))
    return call(
        x,
        _padded(scale),
        _padded(zero_point),
        *words,
        bits=np.int64(codes.bits),
        group=np.int64(codes.group or 0),
        step=np.float32(codes.step),
        low=np.float32(codes.low),
        int_shift=np.int64(shift),
        int_low=np.int64(low),
        int_unit=np.float32(unit),
        table=np.asarray(codes.table or (), np.float32),
        int_table=np.asarray(table, np.int32),
        integer=act is not None,
        instruction_set=instructions,
    )


def _check(x, words, scale, zero_point, codes: Codes, n: int) -> None:
    k, k_padded = x.shape[1], -(-x.shape[1] // 32) * 32
    planes = [(k_padded * width // 32, n) for width in _WIDTHS.get(codes.bits, ())]
    panels = [(-(-n // PANEL), rows, PANEL) for rows, _ in planes]
    given = [plane.shape for plane in words]
    if given not in (planes, panels):
        raise ValueError(
            f"CPU kernels: words of shapes {given}; {codes.bits}-bit codes of [{k}, {n}] take "
            f"{planes}, or {panels} in panels."
        )
    if k % (codes.group or k) or scale.shape != (k // (codes.group or k), n):
        raise ValueError(
            f"CPU kernels: scales of shape {scale.shape} for K={k} in groups of {codes.group or k} "
            f"and N={n}."
        )
    if zero_point is not None and zero_point.shape != scale.shape:
        raise ValueError(
            f"CPU kernels: zero points {zero_point.shape} against scales {scale.shape}."
        )


def _padded(x: Array) -> Array:
    """x [rows, N] with zeros up to a multiple of `PANEL`."""
    missing = -x.shape[1] % PANEL
    return jnp.pad(x, ((0, 0), (0, missing))) if missing else x


def _integers(codes: Codes) -> tuple[int, int, float, tuple[int, ...]] | None:
    """(shift, low, unit, table): the value of a code is ((code << shift) + low) * unit.

    With a table, the code is looked up in it first. None: the values are no such integers.
    """
    if codes.table is None:
        unit = 1.0 if float(codes.low).is_integer() else 0.5
        step, low = codes.step / unit, codes.low / unit
        if step not in (1.0, 2.0) or not low.is_integer():
            return None
        return int(step) - 1, int(low), unit, ()
    if codes.bits != 4:
        return None
    for exponent in range(8):
        values = [v * 2**exponent for v in codes.table]
        if all(math.isfinite(v) and float(v).is_integer() for v in values):
            low = int(min(values))
            looked_up = tuple(int(v) - low for v in values)
            fits = max(looked_up) <= _LARGEST_INTEGER
            return (0, low, 2.0**-exponent, looked_up) if fits else None
    return None
