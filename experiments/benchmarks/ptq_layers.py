"""Seconds a layer of PTQ against the number of layers: python -m experiments.benchmarks.ptq_layers

A stack of square linear layers, each a block of its own, is quantized by one solver after another.
The first layer compiles what all of them share, so that it is told apart: a further one must take
the same time however many there are. Every run is a process of its own.
"""

import json
import statistics
import subprocess
import sys
from collections.abc import Sequence

import jax
import numpy as np
from absl import app, flags
from flax import nnx

from lowbit_jax import ptq
from lowbit_jax.reporting.report import markdown_table

_METHODS = flags.DEFINE_list("methods", [], "Some of the table's rows; default: all.")
_DEPTHS = flags.DEFINE_list("depths", ["2", "4", "8"], "Layers of the stacks, two at least.")
_DIM = flags.DEFINE_integer("dim", 2048, "Inputs and outputs of every layer.", lower_bound=8)
_TOKENS = flags.DEFINE_integer("tokens", 8192, "Rows to calibrate on.", lower_bound=256)
_SCHEME = flags.DEFINE_string("scheme", "w4a16_g128_asym", "Preset.")
_STEPS = flags.DEFINE_integer("steps", 20, "Steps of the reconstructions.", lower_bound=1)
_ONE = flags.DEFINE_string("one", "", "METHOD:DEPTH, in this process, as JSON.")

_BATCH = 1024  # rows


class Layer(nnx.Module):
    """A linear layer and a nonlinearity, so that inputs stay of one size."""

    def __init__(self, dim: int, *, rngs: nnx.Rngs):
        """Makes it."""
        self.linear = nnx.Linear(dim, dim, use_bias=False, rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        """[rows, dim] to [rows, dim]."""
        return jax.nn.tanh(1.5 * self.linear(x))


class Stack(nnx.Module):
    """Layers, one behind the other."""

    def __init__(self, depth: int, dim: int, *, rngs: nnx.Rngs):
        """Makes them."""
        self.layers = nnx.List([Layer(dim, rngs=rngs) for _ in range(depth)])

    def __call__(self, x: jax.Array) -> jax.Array:
        """[rows, dim] to [rows, dim]."""
        for layer in self.layers:
            x = layer(x)
        return x


def methods(steps: int) -> dict[str, ptq.Stage]:
    """What is timed, the fastest first."""
    return {
        "round to nearest": ptq.RoundToNearest(),
        "round to nearest (MSE)": ptq.RoundToNearest("mse"),
        "HQQ": ptq.HQQ(),
        "GPTQ": ptq.GPTQ(),
        "GPTQ (act-order and MSE)": ptq.GPTQ(order="activation", range="mse"),
        f"AutoRound ({steps} steps)": ptq.AutoRound(steps),
        f"OmniQuant ({steps} steps)": ptq.OmniQuant(steps),
    }


def measure(method: str, depth: int) -> dict[str, float]:
    """Seconds of the first layer, of a further one (median), and of all."""
    model = Stack(depth, _DIM.value, rngs=nnx.Rngs(0))
    rng = np.random.default_rng(0)
    # Correlated inputs, as real ones are: GPTQ has something to compensate.
    mixing = rng.standard_normal((_DIM.value, _DIM.value)).astype(np.float32) / _DIM.value**0.5
    batches = [
        rng.standard_normal((_BATCH, _DIM.value)).astype(np.float32) @ mixing
        for _ in range(_TOKENS.value // _BATCH)
    ]
    stage = methods(_STEPS.value)[method]
    _, report = ptq.run(model, _SCHEME.value, batches, [stage], blocks=r"layers/\d+")
    seconds = [block["seconds"] for block in report.blocks]
    return {
        "first": seconds[0],
        "further": statistics.median(seconds[1:]),
        "all": report.seconds,
    }


def main(argv: Sequence[str]) -> None:
    """Measures one run, or all in processes of their own."""
    del argv
    if _ONE.value:
        method, depth = _ONE.value.rsplit(":", 1)
        print(json.dumps(measure(method, int(depth))))
        return
    known = list(methods(_STEPS.value))
    found = _METHODS.value or known
    if unknown := [name for name in found if name not in known]:
        raise app.UsageError(f"--methods={unknown[0]}: is not of {known}.")
    if short := [depth for depth in _DEPTHS.value if not depth.isdigit() or int(depth) < 2]:
        raise app.UsageError(f"--depths={short[0]}: at least 2 layers tell a further one.")
    rows = []
    for method in found:
        for depth in _DEPTHS.value:
            command = [sys.executable, "-m", "experiments.benchmarks.ptq_layers"]
            command += ["--verbosity=-1", *sys.argv[1:], f"--one={method}:{depth}"]
            run = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
            result = json.loads(run.stdout.splitlines()[-1])
            cells = [f"{result[name]:.2f}" for name in ("first", "further", "all")]
            rows.append((method, depth, *cells))
            print(*rows[-1], flush=True)
    heads = ("method", "layers", "first layer, s", "a further one, s", "all, s")
    print("\n".join(markdown_table(heads, rows)))


if __name__ == "__main__":
    app.run(main)
