"""What a run will take, before it starts."""

import time
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from lowbit_jax.ptq.chain import Chain
from lowbit_jax.ptq.layers import get_matrix
from lowbit_jax.ptq.plan import Plan
from lowbit_jax.ptq.stage import Stage
from lowbit_jax.walk import layers


def estimate(
    model: nnx.Module, plan: Plan, chain: Chain, pipeline: Sequence[Stage]
) -> dict[str, Any]:
    """Memory and time of a run.

    Memory: the float and the quantized weights, the inputs and outputs of one block in both chains,
    and of the largest block the second moments of its layers with their factors. Time: the
    floating-point operations that the stages state, at the rate of a product that is timed here;
    compilation is not counted.

    Returns: {"memory_bytes", "seconds"}.
    """
    parameters = sum(x.nbytes for x in jax.tree.leaves(nnx.state(model)))
    modules = dict(layers(model))
    shapes = {
        block: [
            tuple(get_matrix(modules[f"{block}/{path}"]).shape)
            for path, scheme in plan.inside(block).items()
            if scheme.weight is not None
        ]
        for block in plan.blocks
    }
    # Of every layer its moments; of one at a time drift, damped Hessian, factor and inverse.
    moments = max(sum(4 * np.prod(s[:-1]) * s[-2] for s in block) for block in shapes.values())
    largest = max(4 * np.prod(s[:-1]) * s[-2] for block in shapes.values() for s in block)
    tokens = sum(int(np.prod(x.shape[:-1])) for x in chain.xs)
    flops = sum(
        stage.flops(block, tokens, chain.samples) for stage in pipeline for block in shapes.values()
    )
    return {
        "memory_bytes": int(2 * parameters + 4 * chain.nbytes + moments + 4 * largest),
        "seconds": flops / _flops_per_second(),
    }


def check_memory(needed: int, limit: int | None) -> None:
    """Refuses a run that would not fit.

    Raises:
        MemoryError: More is needed than `limit`, or than the machine has available.
    """
    available = _available() if limit is None else limit
    if available is not None and needed > available:
        raise MemoryError(
            f"ptq.run: needs about {needed / 1e9:.2f} GB, and {available / 1e9:.2f} GB are "
            "available. Calibrate on fewer or shorter sequences, free memory, or raise "
            "memory_limit if you know better."
        )


def _available() -> int | None:
    """Bytes that are free: of the accelerator, or of the machine; None where nobody says."""
    stats = jax.devices()[0].memory_stats() or {}
    if "bytes_limit" in stats:
        return int(stats["bytes_limit"]) - int(stats.get("bytes_in_use", 0))
    try:
        with open("/proc/meminfo") as file:
            lines = dict(line.split(":", 1) for line in file)
    except OSError:
        return None
    return int(lines["MemAvailable"].split()[0]) * 1024


def _flops_per_second() -> float:
    """The rate of a float32 product of 512 x 512, the better of two."""
    x = jnp.ones((512, 512), jnp.float32)
    jnp.dot(x, x).block_until_ready()
    seconds = []
    for _ in range(2):
        started = time.perf_counter()
        jnp.dot(x, x).block_until_ready()
        seconds.append(time.perf_counter() - started)
    return 2 * 512**3 / min(seconds)
