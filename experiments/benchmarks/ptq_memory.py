"""Peak memory of PTQ against depth: python -m experiments.benchmarks.ptq_memory

Each depth runs in a process of its own: a decoder of random weights is quantized by GPTQ on random
tokens. What a run adds to the memory before it, less the quantized weights that it makes, must not
grow with depth.

Counted is what is allocated (glibc's `mallinfo2`, every 10 ms). Resident memory is shown beside it:
it also holds what was freed and is kept by malloc, which differed by 170 MB between runs.
"""

import contextlib
import ctypes
import subprocess
import sys
import threading
from collections.abc import Iterator, Sequence

import jax
import numpy as np
from absl import app, flags
from flax import nnx

from lowbit_jax import ptq
from lowbit_jax.models import Decoder, DecoderConfig
from lowbit_jax.ptq.report import peak_memory_bytes

_LAYERS = flags.DEFINE_integer("layers", 0, "One depth, in this process; 0: all.")
_DEPTHS = flags.DEFINE_list("depths", ["4", "8", "16"], "Layers of the decoders.")
_DIM = flags.DEFINE_integer("dim", 256, "Width of the decoders.")


class _Heap(ctypes.Structure):
    """`struct mallinfo2` of glibc's malloc.h; sums over all arenas."""

    _fields_ = [
        (name, ctypes.c_size_t)
        for name in (
            "arena", "ordblks", "smblks", "hblks", "hblkhd",
            "usmblks", "fsmblks", "uordblks", "fordblks", "keepcost",
        )
    ]  # fmt: skip


@contextlib.contextmanager
def allocated_peak() -> Iterator[list[int]]:
    """Yields [bytes allocated now, the most that were so far], to be read behind the block."""
    mallinfo = ctypes.CDLL(None).mallinfo2
    mallinfo.restype = _Heap

    def allocated() -> int:
        heap = mallinfo()
        return int(heap.uordblks + heap.hblkhd)  # in arenas, and mapped on their own

    found = [allocated()] * 2
    done = threading.Event()

    def watch() -> None:
        while not done.wait(0.01):
            found[1] = max(found[1], allocated())

    thread = threading.Thread(target=watch)
    thread.start()
    try:
        yield found
    finally:
        done.set()
        thread.join()


def measure(layers: int, dim: int) -> tuple[float, float, float]:
    """Megabytes that a run allocates and makes resident beyond its new weights, and theirs."""
    config = DecoderConfig(
        vocab=256,
        dim=dim,
        layers=layers,
        heads=dim // 32,
        kv_heads=dim // 32,
        ffn_dim=3 * dim,
        max_length=256,
    )
    model = Decoder(config, rngs=nnx.Rngs(0))
    weights = sum(x.nbytes for x in jax.tree.leaves(nnx.state(model.layers)))
    rng = np.random.default_rng(0)
    batches = [rng.integers(0, 256, (8, 256)).astype(np.int32) for _ in range(16)]
    before = peak_memory_bytes()
    with allocated_peak() as allocated:
        ptq.run(model, "w4a16_g32", batches, [ptq.GPTQ()])
    grown = (allocated[1] - allocated[0], peak_memory_bytes() - before)
    return (grown[0] - weights) / 1e6, (grown[1] - weights) / 1e6, weights / 1e6


def main(argv: Sequence[str]) -> None:
    """Measures one depth, or all in processes of their own."""
    del argv
    if _LAYERS.value:
        extra, resident, weights = measure(_LAYERS.value, _DIM.value)
        print(
            f"{_LAYERS.value} layers: {extra:.0f} MB beyond {weights:.0f} MB of weights "
            f"(resident: {resident:.0f} MB)"
        )
        return
    for depth in _DEPTHS.value:
        module = "experiments.benchmarks.ptq_memory"
        command = [sys.executable, "-m", module, f"--layers={depth}", f"--dim={_DIM.value}"]
        subprocess.run(command, check=True)


if __name__ == "__main__":
    app.run(main)
