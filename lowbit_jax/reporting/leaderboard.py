"""The leaderboard of post-training quantization: methods against schemes, from runs' summaries."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lowbit_jax.reporting.plots import human_bytes, plot_leaderboard
from lowbit_jax.reporting.report import markdown_table

_HEADER = (
    "run",
    "method",
    "scheme",
    "bits per weight",
    "nats per token",
    "over float",
    "KL from float",
    "seconds",
    "peak memory",
    "packed",
)


def leaderboard(summaries: Mapping[str, Mapping[str, Any]], out: Path) -> str:
    """Writes `compare.md` and `compare.png` into `out`; returns the Markdown.

    Figures are those of the packed models.

    Args:
        summaries: A name for each run and its summary.json, at least one; all of runs that
            quantized one model and evaluated it on one text.
        out: Folder; made if it is absent.

    Raises: ValueError: Another model or text, whose increases do not compare.
    """
    _check_equal(summaries, "evaluation_sha256", "evaluated on different text")
    floats = {name: f"{s['float']['nll']:.5f} nats" for name, s in summaries.items()}
    if len(set(floats.values())) > 1:
        raise ValueError(
            f"compare: these runs quantized different models (loss of the float model: "
            f"{_listed(floats)}), so their increases do not compare. Compare those of one model."
        )
    ordered = sorted(
        summaries.items(), key=lambda item: (item[1]["bits_per_weight"], _rise(item[1]))
    )
    best = {scheme: min(cells.values()) for scheme, cells in _by_scheme(ordered).items()}
    first = next(iter(summaries.values()))
    lines = ["# Leaderboard", ""]
    lines += [f"Float: {first['float']['nll']:.5f} nats per token over "]
    lines[-1] += (
        f"{first['evaluation_tokens']:,} tokens. Increase of the packed model's loss, nats "
    )
    lines[-1] += "per token; the least of a column is bold."
    lines += ["", *_pivot(ordered, best), ""]
    lines += [*markdown_table(_HEADER, [_row(*item) for item in ordered]), ""]
    lines += [*_notes(summaries), "![increase of the loss against bits](compare.png)", ""]
    out.mkdir(parents=True, exist_ok=True)
    points = [
        {"method": s["method"], "bits": s["bits_per_weight"], "increase": _rise(s)}
        for _, s in ordered
    ]
    plot_leaderboard(points, out / "compare.png")
    text = "\n".join(lines)
    (out / "compare.md").write_text(text)
    return text


def _rise(summary: Mapping[str, Any]) -> float:
    return summary["packed"]["nll"] - summary["float"]["nll"]


def _by_scheme(
    ordered: list[tuple[str, Mapping[str, Any]]],
) -> dict[str, dict[str, float]]:
    """Scheme -> method -> increase, the widest scheme first; the best of several equal runs."""
    found: dict[str, dict[str, float]] = {}
    for _, summary in reversed(ordered):
        cells = found.setdefault(summary["scheme"], {})
        method = summary["method"]
        cells[method] = min(_rise(summary), cells.get(method, float("inf")))
    return found


def _pivot(ordered: list[tuple[str, Mapping[str, Any]]], best: Mapping[str, float]) -> list[str]:
    schemes = _by_scheme(ordered)
    methods = dict.fromkeys(method for cells in schemes.values() for method in cells)

    def mean(method: str) -> float:
        shares = [c[method] / max(best[s], 1e-9) for s, c in schemes.items() if method in c]
        return sum(shares) / len(shares)

    def cell(scheme: str, method: str) -> str:
        if method not in schemes[scheme]:
            return ""
        rise = schemes[scheme][method]
        return f"**{rise:.4f}**" if rise == best[scheme] else f"{rise:.4f}"

    rows = [(m, *(cell(scheme, m) for scheme in schemes)) for m in sorted(methods, key=mean)]
    return markdown_table(("method", *schemes), rows)


def _row(name: str, summary: Mapping[str, Any]) -> tuple[str, ...]:
    return (
        name,
        summary["method"],
        summary["scheme"],
        f"{summary['bits_per_weight']:.3f}",
        f"{summary['packed']['nll']:.4f}",
        f"{_rise(summary):+.4f}",
        f"{summary['kl_per_token']:.4f}",
        f"{summary['seconds']:.1f}",
        human_bytes(summary["peak_memory_bytes"]),
        human_bytes(summary["packed_bytes"]),
    )


def _notes(summaries: Mapping[str, Mapping[str, Any]]) -> list[str]:
    """What else differs between the runs, and so may explain a gap."""
    texts = {summary["calibration_sha256"] for summary in summaries.values()}
    return [f"The runs calibrated on {len(texts)} different texts.", ""] if len(texts) > 1 else []


def _check_equal(summaries: Mapping[str, Mapping[str, Any]], field: str, what: str) -> None:
    values = {name: summary[field][:12] for name, summary in summaries.items()}
    if len(set(values.values())) > 1:
        raise ValueError(
            f"compare: these runs were {what} ({field}: {_listed(values)}), so their losses do not "
            "compare."
        )


def _listed(values: Mapping[str, str]) -> str:
    return "; ".join(f"{name}: {value}" for name, value in values.items())
