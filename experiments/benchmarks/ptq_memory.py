"""Peak memory of PTQ against depth: python -m experiments.benchmarks.ptq_memory

Each depth runs in a process of its own: a decoder of random weights is quantized by GPTQ on random
tokens. What a run adds to the memory before it, less the quantized weights that it makes, must not
grow with depth.
"""

import resource
import subprocess
import sys
from collections.abc import Sequence

import jax
import numpy as np
from absl import app, flags
from flax import nnx

from lowbit_jax import ptq
from lowbit_jax.models import Decoder, DecoderConfig

_LAYERS = flags.DEFINE_integer("layers", 0, "One depth, in this process; 0: all.")
_DEPTHS = flags.DEFINE_list("depths", ["4", "8", "16"], "Layers of the decoders.")
_DIM = flags.DEFINE_integer("dim", 256, "Width of the decoders.")


def peak() -> int:
    """Largest resident memory of this process so far, in bytes."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def measure(layers: int, dim: int) -> tuple[float, float]:
    """(megabytes that a run adds beyond the weights it makes, megabytes of those weights)."""
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
    before = peak()
    ptq.run(model, "w4a16_g32", batches, [ptq.GPTQ()])
    return (peak() - before - weights) / 1e6, weights / 1e6


def main(argv: Sequence[str]) -> None:
    """Measures one depth, or all in processes of their own."""
    del argv
    if _LAYERS.value:
        extra, weights = measure(_LAYERS.value, _DIM.value)
        print(f"{_LAYERS.value} layers: {extra:.0f} MB beyond {weights:.0f} MB of weights")
        return
    for depth in _DEPTHS.value:
        module = "experiments.benchmarks.ptq_memory"
        command = [sys.executable, "-m", module, f"--layers={depth}", f"--dim={_DIM.value}"]
        subprocess.run(command, check=True)


if __name__ == "__main__":
    app.run(main)
