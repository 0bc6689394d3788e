"""Tiles as data: which block sizes a kernel takes for which shape on which device.

`tuning/<device>.json` holds entries {"bits", "act", "m", "k", "n", "config", "source"}; `m` is the
largest number of rows the entry serves. `source` says where the numbers are from: "measured" on
that device, "compiled" (chosen by counts of a compiler without the device), or "heuristic". A shape
without an entry takes what the backend's own heuristic says.
"""

import dataclasses
import functools
import json
import math
from pathlib import Path
from typing import Any, Final

from kernels_pallas.problem import Problem

_TUNING: Final = Path(__file__).parent / "tuning"


@dataclasses.dataclass(frozen=True, kw_only=True)
class TpuConfig:
    """Block sizes of the TPU kernel, in elements.

    Attributes:
        bm: Rows of x and y; a multiple of 16 (32 with 8-bit activations).
        bk: Along the contraction; a multiple of 256.
        bn: Outputs; a multiple of 128, or all of them.
    """

    bm: int
    bk: int
    bn: int


@dataclasses.dataclass(frozen=True, kw_only=True)
class GpuConfig:
    """Tiles of the Hopper kernel, in elements.

    Attributes:
        bm: Rows of x that one block multiplies: a multiple of 8 up to 256.
        chunk: Elements along K in one field of a word tile; see `gpu/layout.py`.
        stages: Tiles in flight.
        split_k: Blocks that share one output tile, each with its part of K.
        decode: "smem" writes weights to shared memory, which the interpreter can follow;
            "registers" feeds the same weights to the tensor core from registers, which the
            interpreter cannot: it runs "smem" then.
        blocks: 0: a block for every output tile. Otherwise so many blocks, each of which takes one
            output tile after the other, for many rows; not with split_k.
    """

    bm: int
    chunk: int
    stages: int
    split_k: int
    decode: str = "smem"
    blocks: int = 0


@functools.cache
def tuned(device: str) -> tuple[dict[str, Any], ...]:
    """The entries of one device, or of none."""
    path = _TUNING / f"{device.lower().replace(' ', '_')}.json"
    return tuple(json.loads(path.read_text())["entries"]) if path.exists() else ()


def look_up(device: str, problem: Problem, m: int) -> dict[str, Any] | None:
    """The tiles of the entry for this shape with the fewest rows that still holds `m`."""
    fits = [
        entry
        for entry in tuned(device)
        if (entry["bits"], entry["act"]) == (problem.bits, problem.act)
        and (entry["k"], entry["n"]) == (problem.k, problem.n)
        and entry["m"] >= m
    ]
    return min(fits, key=lambda entry: entry["m"])["config"] if fits else None


def round_up(value: int, unit: int) -> int:
    """The smallest multiple of `unit` that is not below `value`."""
    return -(-value // unit) * unit


def largest_divisor(value: int, unit: int, limit: int) -> int:
    """The largest multiple of `unit` that divides `value` and is at most `limit`, or `unit`."""
    sizes = range(unit, min(limit, value) + 1, unit)
    return max((size for size in sizes if value % size == 0), default=unit)


def k_unit(problem: Problem, base: int) -> int:
    """What K is padded to a multiple of: whole tiles of words, and whole groups."""
    if problem.groups == 1 or base % problem.group == 0 or problem.group % base == 0:
        return base
    return math.lcm(base, problem.group)


def k_group(problem: Problem, base: int) -> int:
    """The shortest tile along K that ends at a group and at a multiple of `base`."""
    return base if problem.groups == 1 else math.lcm(base, problem.group)
