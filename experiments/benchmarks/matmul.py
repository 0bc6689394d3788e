"""Packed products against dense float32 and against other libraries, on the CPU.

Every contender is first checked against float64. Warm: one matrix again and again. Cold: matrices
take turns that together are larger than three times any cache here. The dense product takes turns
when its matrix alone is larger than the caches.
"""

import dataclasses
import functools
import itertools
import os
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from matplotlib.figure import Figure

import lowbit_jax as lb
from experiments.benchmarks import cpu_peers
from experiments.benchmarks.timing import Timing, interleaved

SHAPES = ((4096, 4096), (4096, 14336))
BATCHES = (1, 16, 128)
COLD_BYTES = 128 * 2**20
"""More than three times the last cache of the machines that it ran on (32 MiB)."""
DENSE = "dense float32 (XLA)"
OURS = {
    "w4a8_g128": ("w4", "int8"),
    "w4a16_g128": ("w4", None),
    "w3a8_g128": ("w3", "int8"),
    "w2a8_g128": ("w2", "int8"),
    "w1_58a8": ("ternary", "int8"),
    "w1a8": ("binary", "int8"),
    "w8a8": ("w8", "int8"),
    "nf4a16_g64": ("nf4", None),
    "mxfp4a8": ("mxfp4", "int8"),
}
SPECS = {
    "w4": lb.QuantSpec(format=lb.INT4, granularity=lb.PerGroup(128)),
    "w3": lb.QuantSpec(format=lb.INT3, granularity=lb.PerGroup(128)),
    "w2": lb.QuantSpec(format=lb.INT2_HALF, granularity=lb.PerGroup(128)),
    "ternary": lb.QuantSpec(format=lb.TERNARY, granularity=lb.PerTensor()),
    "binary": lb.QuantSpec(format=lb.BINARY, granularity=lb.PerTensor()),
    "w8": lb.QuantSpec(format=lb.INT8),
    "nf4": lb.QuantSpec(format=lb.NF4, granularity=lb.PerGroup(64)),
    "mxfp4": lb.QuantSpec(format=lb.FP4_E2M1, granularity=lb.PerGroup(32), scale_format=lb.E8M0),
}


@dataclasses.dataclass(frozen=True)
class Row:
    """One contender in one cell.

    Attributes:
        k: Rows of the matrix.
        n: Its columns.
        m: Rows of x.
        cold: Whether the matrices take turns.
        timing: Its seconds, and ratios to the dense product.
        nbytes: Bytes of the matrix as the contender reads it.
        error: Relative error against float64, in the Frobenius norm.
    """

    k: int
    n: int
    m: int
    cold: bool
    timing: Timing
    nbytes: int
    error: float


@dataclasses.dataclass(frozen=True)
class Contender:
    """A product by one of several copies of a matrix.

    Attributes:
        run: (copy, x) -> y.
        nbytes: Bytes of one copy.
        copies: How many there are.
        limit: Of the relative error: what int8 activations, or float32 sums, may cost.
    """

    run: Callable[[int, Any], Any]
    nbytes: int
    copies: int
    limit: float


def measure(
    *,
    rounds: int,
    shapes: Sequence[tuple[int, int]] = SHAPES,
    batches: Sequence[int] = BATCHES,
    names: Sequence[str] | None = None,
) -> list[Row]:
    """Checks and times every contender in every cell, on fresh random data."""
    rng = np.random.default_rng()
    rows: list[Row] = []
    for k, n in shapes:
        for cold in (False, True):
            found = contenders(rng, k, n, cold, names)
            for m in batches:
                x = rng.normal(size=(m, k)).astype(np.float32)
                rows += _cell(found, x, k, n, cold, rounds)
    return rows


def contenders(
    rng: np.random.Generator, k: int, n: int, cold: bool, names: Sequence[str] | None
) -> dict[str, tuple[Contender, np.ndarray]]:
    """Name to the contender and the float64 matrix that it stands for."""
    w = rng.normal(size=(k, n)).astype(np.float32)
    found: dict[str, tuple[Contender, np.ndarray]] = {}

    def copies(nbytes: int) -> int:
        return -(-COLD_BYTES // nbytes) if cold else 1

    dense = [jnp.array(w) for _ in range(copies(w.nbytes))]
    found[DENSE] = (Contender(_over(jnp.matmul, dense), w.nbytes, len(dense), 1e-5), _float64(w))
    for name, (spec, act) in OURS.items():
        if names is None or name in names:
            q = jax.jit(functools.partial(lb.quantize, spec=SPECS[spec]))(w)
            prepared = [lb.prepare(q)]
            prepared += [_copy(prepared[0]) for _ in range(copies(q.nbytes) - 1)]
            run = _over(functools.partial(_multiply, act), prepared)
            one = Contender(run, q.nbytes, len(prepared), 2e-2 if act else 1e-5)
            found[name] = (one, _float64(q.dequantize(jnp.float32)))
    codes = rng.integers(0, 16, (k, n))
    scale = rng.uniform(0.5, 1, (k // cpu_peers.GROUP, n)).astype(np.float32)
    exact = (codes - cpu_peers.ZERO) * np.repeat(scale, cpu_peers.GROUP, 0).astype(np.float64)
    nbytes = codes.size // 2 + scale.nbytes
    for name, make in (
        ("onnxruntime MatMulNBits level 4", cpu_peers.onnxruntime_product),
        ("openvino u4", cpu_peers.openvino_product),
    ):
        made = [make(codes, scale, os.cpu_count() or 1) for _ in range(copies(nbytes))]
        if made[0] is not None:

            def run(i: int, x: Any, made: list[Any] = made) -> Any:
                return made[i](x)

            found[name] = (Contender(run, nbytes, len(made), 2e-2), exact)
    return found


def _multiply(act: Any, x: jax.Array, matrix: lb.Prepared) -> jax.Array:
    return lb.matmul(x, matrix, act=act)


def _over(f: Callable[..., jax.Array], matrices: list[Any]) -> Callable[[int, Any], jax.Array]:
    compiled = jax.jit(f)
    return lambda i, x: compiled(x, matrices[i])


def _copy(tree: Any) -> Any:
    return jax.tree.map(lambda leaf: jnp.array(leaf, copy=True), tree)


def _float64(w: Any) -> np.ndarray:
    return np.asarray(w, np.float64)


def _cell(
    found: dict[str, tuple[Contender, np.ndarray]],
    x: np.ndarray,
    k: int,
    n: int,
    cold: bool,
    rounds: int,
) -> Iterator[Row]:
    errors, runs = {}, {}
    on_device = jnp.asarray(x)
    for name, (contender, exact) in found.items():
        ours = name == DENSE or name in OURS
        given = on_device if ours else x
        reference = x.astype(np.float64) @ exact
        y = np.asarray(contender.run(0, given), np.float64)
        errors[name] = float(np.linalg.norm(y - reference) / np.linalg.norm(reference))
        if not errors[name] <= contender.limit:
            raise AssertionError(
                f"{name}, {len(x)} x {k} x {n}: relative error {errors[name]:.2e} is above "
                f"{contender.limit:.0e}."
            )
        turns = itertools.cycle(range(contender.copies))

        def run(contender: Contender = contender, given: Any = given, turns: Any = turns) -> Any:
            return contender.run(next(turns), given)

        for _ in range(contender.copies):  # every copy has been used once before
            jax.block_until_ready(run())
        runs[name] = run
    # Threads of other libraries spin for a while behind their own calls: two calls wait them out.
    for timing in interleaved(runs, rounds=rounds, baseline=DENSE, before=2):
        nbytes = found[timing.name][0].nbytes
        yield Row(k, n, len(x), cold, timing, nbytes, errors[timing.name])


def bandwidth() -> float:
    """Bytes a second at which XLA sums 512 MiB: the memory's, as far as this process gets it."""
    x = jnp.ones(2**27, jnp.float32)
    total = jax.jit(jnp.sum)
    run = {"sum": lambda: total(x)}
    jax.block_until_ready(run["sum"]())
    return x.nbytes / min(interleaved(run, rounds=5, baseline="sum")[0].seconds)


def table(rows: Sequence[Row], rate: float) -> str:
    """The result as Markdown."""
    import kernels_cpu

    lines = [
        f"x [M, K] by a packed [K, N], {os.cpu_count()} threads, {kernels_cpu.instruction_set()}, "
        f"{len(rows[0].timing.seconds)} interleaved rounds, jax {jax.__version__}; memory "
        f"{rate / 1e9:.1f} GB/s. Times: median over the rounds of the other's time over the "
        "row's own in the same round; above 1 the row is faster.",
    ]
    for (k, n, m, cold), cell in itertools.groupby(rows, lambda r: (r.k, r.n, r.m, r.cold)):
        shown = list(cell)
        peers = [row for row in shown if row.timing.name not in OURS]
        lines += [
            "",
            f"K {k}, N {n}, M {m}, {'cold' if cold else 'warm'}:",
            "",
            "| | us (median) | 25 % .. 75 % | GB/s of the matrix | of memory | error | "
            + " | ".join(f"times {peer.timing.name}" for peer in peers)
            + " |",
            "|---|---|---|---|---|---|" + "---|" * len(peers),
        ]
        for row in shown:
            times = [
                np.median(np.divide(peer.timing.seconds, row.timing.seconds)) for peer in peers
            ]
            low, high = np.percentile(row.timing.seconds, [25, 75]) * 1e6
            speed = row.nbytes / row.timing.median
            lines.append(
                f"| {row.timing.name} | {row.timing.median * 1e6:.0f} | {low:.0f} .. {high:.0f} | "
                f"{speed / 1e9:.1f} | {100 * speed / rate:.0f} % | {row.error:.1e} | "
                + " | ".join(f"{ratio:.2f}" for ratio in times)
                + " |"
            )
    return "\n".join(lines)


def plot(rows: Sequence[Row], path: Path) -> None:
    """Times dense, by contender, one panel a cell, as PNG."""
    cells = [
        (key, list(cell))
        for key, cell in itertools.groupby(rows, lambda r: (r.k, r.n, r.m, r.cold))
    ]
    columns = min(3, len(cells))
    height = -(-len(cells) // columns)
    figure = Figure(figsize=(5 * columns, 3.4 * height), layout="constrained")
    grid = figure.subplots(height, columns, squeeze=False, sharey=True)
    for axes in list(grid.flat)[len(cells) :]:
        axes.axis("off")
    for axes, ((k, n, m, cold), cell) in zip(grid.flat, cells, strict=False):
        shown = [row for row in cell if row.timing.name != DENSE]
        names = [row.timing.name for row in shown]
        colors = ["#1f4e79" if name in OURS else "#c8553d" for name in names]
        axes.barh(names, [1 / row.timing.ratio for row in shown], color=colors)
        axes.axvline(1, color="#8a97a3", linewidth=1)
        axes.set_title(f"{m} x {k} x {n}, {'cold' if cold else 'warm'}", fontsize=10)
        axes.set_xlabel("times as fast as dense float32")
        axes.invert_yaxis()
    figure.savefig(path, dpi=110)
