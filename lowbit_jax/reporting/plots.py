"""A run's pictures: the loss curve, and latent weights on the grid that they are rounded to."""

import dataclasses
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from lowbit_jax.reporting.metrics import series

_INK, _MUTED, _GRID = "#22313f", "#8a97a3", "#e3e8ec"
_TRAIN, _VALID, _MARK = "#7fa8d1", "#1f4e79", "#c8553d"
_COLORS = (
    *("#1f4e79", "#c8553d", "#3a8f6b", "#8661a8", "#c9962b"),
    *("#4f9fc4", "#b1477b", "#6b7a3a", "#5a6570", "#d98d7c"),
)
_MARKERS = "osD^vPX<>*"
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


def plot_pareto(points: Sequence[Mapping[str, Any]], path: Path, *, title: str) -> None:
    """Validation loss against bits per weight, a point a method, as PNG.

    Those that nothing beats are joined and have their names beside them.

    Args:
        points: `{"name", "bits", "bits_per_byte"}` each.
        path: Of the PNG.
        title: Above the plot.
    """
    figure, axes = _figure(9.5, 6.0)
    best = pareto(points)
    for point in points:
        chosen = point in best
        at = (point["bits"], point["bits_per_byte"])
        axes.plot(*at, "o", color=_MARK if chosen else _TRAIN, markersize=6 if chosen else 4)
        if chosen:
            axes.annotate(
                point["name"],
                at,
                xytext=(-4, -4),
                textcoords="offset points",
                fontsize=8,
                color=_INK,
                ha="right",
                va="top",
            )
    line = [(p["bits"], p["bits_per_byte"]) for p in best]
    axes.step(*zip(*line, strict=True), where="post", color=_MARK, linewidth=1.0)
    axes.set_xscale("log", base=2)
    ticks = 2.0 ** np.arange(6)
    axes.set_xticks(ticks, [f"{tick:g}" for tick in ticks])
    axes.set_xlabel("bits per quantized weight, with scales", color=_INK)
    axes.set_ylabel("validation, bits per byte", color=_INK)
    axes.set_title(title, loc="left", color=_INK, fontsize=11)
    axes.margins(x=0.08)
    _save(figure, path)


def pareto(points: Sequence[Mapping[str, Any]]) -> list[Mapping[str, Any]]:
    """The points that no other beats in both bits and loss, by rising bits."""
    chosen: list[Mapping[str, Any]] = []
    for point in sorted(points, key=lambda p: (p["bits"], p["bits_per_byte"])):
        if not chosen or point["bits_per_byte"] < chosen[-1]["bits_per_byte"]:
            chosen.append(point)
    return chosen


def plot_sqnr(rows: Sequence[Mapping[str, Any]], path: Path, *, title: str) -> None:
    """Signal-to-noise ratio of every quantized layer over the depth, as PNG; a line per kind.

    Args:
        rows: `{"path", "sqnr_db", "error_after"}` each; where layers have the last, the relative
            squared error of their output, a second panel shows it in dB.
        path: Of the PNG.
        title: Above the plot.
    """
    panels = [("weights", [row["sqnr_db"] for row in rows])]
    errors = [row["error_after"] for row in rows if row.get("error_after") is not None]
    if rows and len(errors) == len(rows):
        ratios = [-10 * np.log10(max(error, 1e-12)) for error in errors]
        panels.append(("layer outputs, calibration data", ratios))
    figure = Figure(figsize=(5.2 * len(panels) + 1.6, 4.0), layout="constrained")
    kinds = list(dict.fromkeys(_split_path(row["path"])[1] for row in rows))
    for number, (name, values) in enumerate(panels):
        axes = figure.add_subplot(1, len(panels), number + 1)
        _style(axes)
        for index, kind in enumerate(kinds):
            points = [
                (_split_path(row["path"])[0], value)
                for row, value in zip(rows, values, strict=True)
                if _split_path(row["path"])[1] == kind
            ]
            marker, color = _MARKERS[index % len(_MARKERS)], _COLORS[index % len(_COLORS)]
            axes.plot(*zip(*points, strict=True), color=color, marker=marker, lw=1.2, label=kind)
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        axes.set_xlabel("block", color=_INK)
        axes.set_ylabel("SQNR, dB", color=_INK)
        axes.set_title(name, loc="left", color=_INK, fontsize=10)
    figure.legend(
        *figure.axes[0].get_legend_handles_labels(),
        loc="outside right upper",
        frameon=False,
        labelcolor=_INK,
        fontsize=9,
    )
    figure.suptitle(title, x=0.01, ha="left", color=_INK, fontsize=11)
    _save(figure, path)


def plot_leaderboard(points: Sequence[Mapping[str, Any]], path: Path) -> None:
    """Increase of the loss against bits per weight, one line a method, as PNG.

    Args:
        points: `{"method", "bits", "increase"}` each; increases in nats per token, over 0 for the
            logarithmic axis to show them.
        path: Of the PNG.
    """
    figure, axes = _figure(8.4, 4.6)
    methods = list(dict.fromkeys(point["method"] for point in points))
    for index, method in enumerate(methods):
        own = sorted((p["bits"], p["increase"]) for p in points if p["method"] == method)
        marker, color = _MARKERS[index % len(_MARKERS)], _COLORS[index % len(_COLORS)]
        axes.plot(*zip(*own, strict=True), marker=marker, color=color, lw=1.2, label=method)
    if any(point["increase"] > 0 for point in points):
        axes.set_yscale("log", nonpositive="mask")
    axes.grid(axis="y", which="minor", color=_GRID, linewidth=0.4)
    axes.set_xlabel("bits per quantized weight, with scales", color=_INK)
    axes.set_ylabel("loss over float, nats per token", color=_INK)
    figure.legend(loc="outside right upper", frameon=False, labelcolor=_INK, fontsize=8)
    _save(figure, path)


def _split_path(path: str) -> tuple[int, str]:
    """`layers/3/mlp/up` -> (3, "mlp/up"); what is in no block stands at 0 under its own name."""
    match = re.search(r"(?:^|/)(\d+)/", path)
    return (int(match[1]), path[match.end() :]) if match else (0, path)


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
