"""A run's pictures: the loss curve, and latent weights on the grid that they are rounded to."""

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from lowbit_jax.reporting.metrics import series

_INK, _MUTED, _GRID = "#22313f", "#8a97a3", "#e3e8ec"
_TRAIN, _VALID, _MARK = "#7fa8d1", "#1f4e79", "#c8553d"
_SHADES = ("#7fa8d1", "#1f4e79")
_MOST_LEVELS_SHOWN = 32


@dataclasses.dataclass(frozen=True)
class WeightSample:
    """Latent weights of one layer.

    path: The layer's.
    weights: Flat, in units of their scale (a float layer: as they are).
    grid: The values they are rounded to, ascending; empty for a float layer.
    """

    path: str
    weights: np.ndarray
    grid: np.ndarray


def plot_loss(rows: list[dict[str, Any]], path: Path, *, title: str) -> None:
    """Training and validation loss over steps, in nats per token, as PNG.

    Args:
        rows: From `read_metrics`.
        path: Of the PNG.
        title: Above the plot.
    """
    figure, axes = _figure(7.5, 4.2)
    steps, losses = series(rows, "train", "loss")
    axes.plot(steps, losses, color=_TRAIN, linewidth=1.2, label="training (mean since last point)")
    valid_steps, valid = series(rows, "eval", "nll")
    axes.plot(valid_steps, valid, color=_VALID, marker="o", markersize=4, label="validation")
    if everything := losses + valid:
        # The first steps fall from log(vocabulary) and would press everything else flat.
        settled = [x for s, x in zip(steps, losses, strict=True) if s >= 0.05 * steps[-1]]
        top, low = max(settled + valid, default=max(everything)), min(everything)
        axes.set_ylim(low - 0.05 * (top - low) - 1e-3, top + 0.05 * (top - low) + 1e-3)
    axes.set_xlabel("step", color=_INK)
    axes.set_ylabel("loss, nats per token", color=_INK)
    bits = axes.secondary_yaxis(
        "right", functions=(lambda n: n / np.log(2), lambda b: b * np.log(2))
    )
    bits.set_ylabel("bits per token", color=_MUTED)
    bits.tick_params(colors=_MUTED, labelsize=8)
    bits.spines["right"].set_color(_GRID)
    axes.legend(frameon=False, labelcolor=_INK)
    axes.set_title(title, loc="left", color=_INK, fontsize=11)
    _save(figure, path)


def plot_weights(samples: list[WeightSample], path: Path, *, title: str) -> None:
    """Histograms of latent weights, one panel a layer, as PNG.

    The shade changes where the code does, so that a panel shows which weights share a value; up to
    five levels, the share of each is written above it.
    """
    columns = min(3, max(1, len(samples)))
    rows = -(-max(1, len(samples)) // columns)
    figure = Figure(figsize=(3.6 * columns, 2.6 * rows + 0.5), layout="constrained")
    for index, sample in enumerate(samples):
        axes = figure.add_subplot(rows, columns, index + 1)
        _style(axes)
        _histogram(axes, sample)
        axes.set_title(sample.path, fontsize=9, color=_INK)
        axes.set_yticks([])
        unit = "weight / scale" if sample.grid.size else "weight"
        axes.set_xlabel(unit, fontsize=8, color=_MUTED)
    figure.suptitle(title, x=0.01, ha="left", color=_INK, fontsize=11)
    _save(figure, path)


def plot_comparison(points: list[dict[str, Any]], path: Path) -> None:
    """Validation loss against packed bytes, one point a run, as PNG.

    Args:
        points: `{"name", "bytes", "bits_per_byte"}` each.
        path: Of the PNG.
    """
    figure, axes = _figure(7.0, 4.4)
    for point in sorted(points, key=lambda p: p["bytes"]):
        axes.plot(point["bytes"], point["bits_per_byte"], "o", color=_VALID, markersize=7)
        axes.annotate(
            point["name"],
            (point["bytes"], point["bits_per_byte"]),
            xytext=(7, 4),
            textcoords="offset points",
            fontsize=9,
            color=_INK,
        )
    axes.set_xscale("log", base=2)
    low, high = (f(p["bytes"] for p in points) for f in (min, max))
    axes.set_xlim(low / 1.3, high * 2.2)  # room for the last name
    ticks = 2.0 ** np.arange(np.floor(np.log2(low / 1.3)), np.ceil(np.log2(high * 2.2)) + 1)
    axes.set_xticks(ticks, [human_bytes(t) for t in ticks])
    axes.set_xlabel("size of the packed model", color=_INK)
    axes.set_ylabel("validation, bits per byte", color=_INK)
    axes.margins(y=0.15)
    _save(figure, path)


def human_bytes(count: float) -> str:
    """`1.5 MB`; powers of 1000."""
    for unit in ("B", "kB", "MB", "GB"):
        if count < 1000 or unit == "GB":
            break
        count /= 1000
    return f"{count:.3g} {unit}"


def _histogram(axes: Axes, sample: WeightSample) -> None:
    grid, weights = sample.grid, sample.weights
    if not 0 < grid.size <= _MOST_LEVELS_SHOWN:
        axes.hist(weights, bins=101, color=_TRAIN)
        return
    cuts = (grid[1:] + grid[:-1]) / 2
    span = grid[-1] - grid[0]
    low = max(np.quantile(weights, 0.0005), grid[0] - 1.5 * span)
    high = min(np.quantile(weights, 0.9995), grid[-1] + 1.5 * span)
    low, high = min(low, grid[0] - span / 8), max(high, grid[-1] + span / 8)
    # Every cut between two codes is the edge of a bin, so that no bin mixes two shades.
    width = (high - low) / (120 if weights.size > 20_000 else 60)
    inner = np.concatenate([[low], cuts, [high]])
    edges = np.concatenate(
        [np.linspace(a, b, max(2, round((b - a) / width)), False) for a, b in _pairs(inner)]
        + [[high]]
    )
    counts, _ = np.histogram(weights, edges)
    density = counts / np.diff(edges)
    code = np.searchsorted(cuts, (edges[1:] + edges[:-1]) / 2)
    colors = [_SHADES[c % 2] for c in code]
    axes.bar(edges[:-1], density, np.diff(edges), align="edge", color=colors)
    top = density.max() * (1.18 if grid.size <= 5 else 1.05)
    axes.set_ylim(0, top)
    axes.set_xlim(low, high)
    axes.vlines(grid, 0, top, color=_MARK, linewidth=0.8, alpha=0.7, linestyle=":")
    if grid.size <= 5:
        shares = np.bincount(np.searchsorted(cuts, weights), minlength=grid.size) / weights.size
        for value, share in zip(grid, shares, strict=True):
            axes.text(value, top * 0.93, f"{share:.0%}", ha="center", fontsize=8, color=_MARK)


def _pairs(values: np.ndarray) -> list[tuple[float, float]]:
    return list(zip(values[:-1].tolist(), values[1:].tolist(), strict=True))


def _figure(width: float, height: float) -> tuple[Figure, Axes]:
    figure = Figure(figsize=(width, height), layout="constrained")
    axes = figure.add_subplot()
    _style(axes)
    return figure, axes


def _style(axes: Axes) -> None:
    axes.spines[["top", "right"]].set_visible(False)
    axes.spines[["left", "bottom"]].set_color(_MUTED)
    axes.tick_params(colors=_MUTED, labelsize=8)
    axes.grid(axis="y", color=_GRID, linewidth=0.8)
    axes.set_axisbelow(True)


def _save(figure: Figure, path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=130)
