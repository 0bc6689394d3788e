"""SHA-256 of every array: of its elements in row-major order, without shape and dtype.

Elements are hashed as they lie in memory, little-endian on every platform that jax supports.
"""

import concurrent.futures
import hashlib
import os
from typing import Any

import jax
import numpy as np
from flax import nnx
from jax.experimental import multihost_utils

from lowbit_jax.checkpoint.tree import parts

type Digests = dict[str, str | dict[str, str]]


def digest(model: nnx.Module) -> str:
    """One SHA-256 of all a model's arrays and their paths, the same for every placement.

    `save(..., source_sha256=digest(float_model))` says what a quantized model was made from.
    """
    lines = [f"{'/'.join(path)} {value}" for path, value in _by_part(nnx.state(model)).items()]
    return hashlib.sha256("\n".join(sorted(lines)).encode()).hexdigest()


def digests(state: nnx.State) -> Digests:
    """By tensor; for a quantized one by part: {"words_0": ..., "scale": ...}.

    The same for every placement of the arrays. Where several processes hold one it is gathered, an
    array at a time, and all of them have to call this.
    """
    result: dict[str, Any] = {}
    for (name, part), value in _by_part(state).items():
        if part:
            result.setdefault(name, {})[part] = value
        else:
            result[name] = value
    return result


def differing(expected: dict[str, Any], found: Digests) -> list[str]:
    """Names of the arrays that have another digest than the manifest's tensors say."""
    wrong = []
    for name, entry in expected.items():
        want, got = entry["sha256"], found[name]
        if isinstance(want, str) or isinstance(got, str):
            wrong += [name] if want != got else []
        else:
            wrong += [f"{name}/{part}" for part in want | got if want.get(part) != got.get(part)]
    return wrong


def _by_part(state: nnx.State) -> dict[tuple[str, str], str]:
    arrays = parts(state)
    # hashlib lets go of the interpreter's lock; a gathering needs the same order in all processes.
    threads = 1 if jax.process_count() > 1 else min(4, os.cpu_count() or 1)
    with concurrent.futures.ThreadPoolExecutor(threads) as pool:
        return dict(zip(arrays, pool.map(_sha256, arrays.values()), strict=True))


def _sha256(array: Any) -> str:
    if jax.dtypes.issubdtype(array.dtype, jax.dtypes.prng_key):
        array = jax.random.key_data(array)
    if isinstance(array, jax.Array) and not array.is_fully_addressable:
        array = multihost_utils.process_allgather(array, tiled=True)
    flat = np.ascontiguousarray(array).reshape(-1)
    return hashlib.sha256(flat.view(np.uint8)).hexdigest()
