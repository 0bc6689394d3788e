"""Damage of files: of bytes, of the numbers of binary headers, and of JSON as JSON.

The JSON header of a safetensors file is damaged as JSON too and its length made right again, so
that lies get past the first check of a reader.
"""

import json
import struct
from collections.abc import Callable, Mapping
from typing import Any, Final

import numpy as np

Files = Mapping[str, bytes]

_NUMBERS: Final = (0, 1, 2, 3, 31, 255, 2**16, 2**31 - 1, 2**31, 2**32, 2**53, 2**63 - 1, 2**64 - 1)
_VALUES: Final[tuple[Any, ...]] = (
    None, True, False, -1, 0.5, -0.0, 1e308, float("nan"), float("inf"), 10**30, "", "x", "\0",
    "../../etc/passwd", "/etc/passwd", "a" * 5000, "é\ud800", "re:(a+)+$", "int4", "float64",
    [], {}, [[]], [0], [-1], [2**40], [2**31, 2**31], {"a": {}}, {"": 0}, *_NUMBERS,
)  # fmt: skip
_DEEP: Final = 3000


def damaged(rng: np.random.Generator, files: Files) -> dict[str, bytes]:
    """The files with one of them damaged in one to four places, or gone, empty or exchanged."""
    names, result = sorted(files), dict(files)
    name = names[rng.integers(len(names))]
    match int(rng.integers(40)):
        case 0:
            del result[name]
        case 1:
            result[name] = b""
        case 2:
            result[name] = files[names[rng.integers(len(names))]]
        case _:
            for _ in range(rng.integers(1, 5)):
                result[name] = _once(rng, name, result[name])
    return result


def _once(rng: np.random.Generator, name: str, content: bytes) -> bytes:
    kinds: list[Callable[[np.random.Generator, bytes], bytes]] = [_bytes, _number]
    if name.endswith((".json", ".zarray")):
        kinds += [_json] * 6
    elif name.endswith(".safetensors"):
        kinds += [_header] * 6
    return kinds[rng.integers(len(kinds))](rng, content)


def _place(rng: np.random.Generator, content: bytes) -> int:
    """Half of the time near the beginning, where headers are."""
    end = len(content) if rng.integers(2) else min(len(content), 1500)
    return int(rng.integers(end)) if end else 0


def _bytes(rng: np.random.Generator, content: bytes) -> bytes:
    """Bytes changed, a bit flipped, a piece cut out, doubled or moved, or the end cut off."""
    changed = bytearray(content)
    if not changed:
        return content
    at, length = _place(rng, content), int(rng.integers(1, 40))
    match int(rng.integers(6)):
        case 0:
            changed[at] = rng.integers(256)
        case 1:
            changed[at] ^= 1 << rng.integers(8)
        case 2:
            del changed[at : at + length]
        case 3:
            changed[at:at] = changed[at : at + length]
        case 4:
            piece = bytes(changed[at : at + length])
            to = _place(rng, content)
            changed[to : to + len(piece)] = piece
        case 5:
            del changed[at:]
    return bytes(changed)


def _number(rng: np.random.Generator, content: bytes) -> bytes:
    """Two, four or eight bytes become a number that a header may abuse."""
    width = (2, 4, 8)[rng.integers(3)]
    if len(content) < width:
        return content
    at = min(_place(rng, content), len(content) - width)
    value = (*_NUMBERS, len(content), len(content) - at)[rng.integers(len(_NUMBERS) + 2)]
    raw = (value % 2 ** (8 * width)).to_bytes(width, "little")
    return content[:at] + raw + content[at + width :]


def _header(rng: np.random.Generator, content: bytes) -> bytes:
    """safetensors: the header changed as JSON, its length made right."""
    if len(content) < 8:
        return content
    (length,) = struct.unpack("<Q", content[:8])
    header = _json(rng, content[8 : 8 + length])
    return struct.pack("<Q", len(header)) + header + content[8 + length :]


def _json(rng: np.random.Generator, content: bytes) -> bytes:
    """A value replaced, removed, copied to another place, given another key, or nested deeply."""
    try:
        root = json.loads(content)
    except (ValueError, RecursionError):
        return _bytes(rng, content)
    nodes = list(_nodes(root))
    if not nodes:
        return _bytes(rng, content)
    parent, key = nodes[rng.integers(len(nodes))]
    match int(rng.integers(8)):
        case 0 | 1 | 2:
            parent[key] = _VALUES[rng.integers(len(_VALUES))]
        case 3:
            del parent[key]
        case 4:
            other, place = nodes[rng.integers(len(nodes))]
            parent[key] = json.loads(json.dumps(other[place]))
        case 5 if isinstance(parent, dict):
            parent[str(_VALUES[rng.integers(len(_VALUES))])] = parent.pop(key)
        case 6 if type(parent[key]) in (int, float):
            parent[key] = parent[key] + (1, -1, 0.5, parent[key])[rng.integers(4)]
        case 7 if not rng.integers(10):
            mark = json.dumps("here it is nested")
            parent[key] = json.loads(mark)
            deep = "[" * _DEEP + "]" * _DEEP
            return json.dumps(root).replace(mark, deep).encode()
        case _:
            parent[key] = [parent[key]]
    return json.dumps(root).encode()


def _nodes(value: Any) -> Any:
    """Every (container, key), outer ones first, so that few are of the long lists at the ends."""
    level = [value]
    while level:
        below = []
        for container in level:
            keys = container if isinstance(container, dict) else range(len(container))
            for key in list(keys)[:200]:
                yield container, key
                if isinstance(container[key], dict | list):
                    below.append(container[key])
        level = below
