"""Several runs side by side: a Markdown table and a plot of loss against size.

Runs of training by packed bytes; runs of post-training quantization as a leaderboard.
"""

from pathlib import Path
from typing import Any

from lowbit_jax.reporting.leaderboard import leaderboard
from lowbit_jax.reporting.plots import human_bytes, plot_comparison
from lowbit_jax.reporting.report import markdown_table

_HEADER = (
    "run",
    "recipe",
    "packed",
    "bits per weight",
    "nats per token",
    "bits per byte",
    "steps",
    "training tokens/s",
)


def compare(summaries: dict[str, dict[str, Any]], out: Path) -> str:
    """Writes `compare.md` and `compare.png` into `out`; returns the Markdown.

    Args:
        summaries: A name for each run (such as its folder's) and its summary.json, at least one.
        out: Folder; made if it is absent.
    Raises: ValueError: No runs, runs of different kinds, or on different text, whose losses do not
        compare.
    """
    if not summaries:
        raise ValueError("compare: no runs were given.")
    quantized = [name for name, summary in summaries.items() if "method" in summary]
    if quantized:
        if len(quantized) < len(summaries):
            trained = sorted(set(summaries) - set(quantized))
            raise ValueError(
                f"compare: {trained[0]} was trained, and {quantized[0]} quantized after training. "
                "Their tables differ: compare runs of one kind."
            )
        return leaderboard(summaries, out)
    corpora = {name: summary["corpus_sha256"] for name, summary in summaries.items()}
    if len(set(corpora.values())) > 1:
        listed = "; ".join(f"{name}: {sha256[:12]}" for name, sha256 in corpora.items())
        raise ValueError(
            f"compare: these runs were evaluated on different text (corpus sha256: {listed}), so "
            "their losses do not "
            "compare. Evaluate them on one text with experiments.evaluate --source."
        )
    rows = sorted(
        ((name, summary) for name, summary in summaries.items()),
        key=lambda item: item[1]["packed"]["bytes"],
    )
    lines = ["# Comparison", "", *markdown_table(_HEADER, [_row(*item) for item in rows])]
    lines += ["", *_notes(summaries), "![loss against packed bytes](compare.png)", ""]
    out.mkdir(parents=True, exist_ok=True)
    points = [
        {
            "name": name,
            "bytes": summary["packed"]["bytes"],
            "bits_per_byte": summary["packed"]["bits_per_byte"],
        }
        for name, summary in rows
    ]
    plot_comparison(points, out / "compare.png")
    text = "\n".join(lines)
    (out / "compare.md").write_text(text)
    return text


def _row(name: str, summary: dict[str, Any]) -> tuple[str, ...]:
    packed = summary["packed"]
    return (
        name,
        summary["recipe"] or "float",
        human_bytes(packed["bytes"]),
        f"{packed['bits_per_weight']:.3f}",
        f"{packed['valid_nll']:.4f}",
        f"{packed['bits_per_byte']:.4f}",
        str(summary["steps"]),
        f"{summary['tokens_per_second']:,.0f}",
    )


def _notes(summaries: dict[str, dict[str, Any]]) -> list[str]:
    """What else differs between the runs, and so may explain a gap."""
    notes = []
    for field, words in (("tokens", "training tokens"), ("params", "parameters")):
        found = {summary.get(field) for summary in summaries.values()}
        if len(found) > 1:
            notes.append(
                f"The runs differ in {words}: {', '.join(map(str, sorted(found, key=str)))}."
            )
    return [*notes, ""] if notes else []
