"""The end of a run in words and numbers: the table on the screen and report.md."""

from collections.abc import Sequence
from typing import Any

from rich.table import Table

from lowbit_jax.reporting.plots import human_bytes


def result_rows(summary: dict[str, Any]) -> list[tuple[str, str, str]]:
    """`(what, as trained, packed)`, the same lines for the screen and for the report."""
    valid, packed = summary["valid"], summary["packed"]
    return [
        ("size", human_bytes(summary["float_bytes"]), human_bytes(packed["bytes"])),
        ("bits per quantized weight", "32", f"{packed['bits_per_weight']:.3f}"),
        ("validation, nats per token", f"{valid['nll']:.5f}", f"{packed['valid_nll']:.5f}"),
        (
            "validation, bits per byte",
            f"{valid['bits_per_byte']:.4f}",
            f"{packed['bits_per_byte']:.4f}",
        ),
        ("perplexity", f"{valid['ppl']:.3f}", f"{packed['ppl']:.3f}"),
        (
            "forward pass, tokens/s",
            f"{summary['forward_tokens_per_second']:,.0f}",
            f"{packed['forward_tokens_per_second']:,.0f}",
        ),
    ]


def result_table(summary: dict[str, Any]) -> Table:
    """The table that ends a run."""
    table = Table(title=f"{summary['config']}: {summary['steps']} steps", title_justify="left")
    table.add_column("")
    table.add_column(_as_trained(summary), justify="right")
    table.add_column("packed, reloaded", justify="right")
    for row in result_rows(summary):
        table.add_row(*row)
    return table


def report(
    summary: dict[str, Any], *, layers: str, sample: str, changed: list[str], command: str
) -> str:
    """report.md as text.

    Args:
        summary: As in summary.json.
        layers: `str(lb.summary(packed))`.
        sample: Text from the packed model.
        changed: What in the config differs from the defaults, one line each.
        command: How to sample from this run.
    """
    lines = [f"# {summary['config']}", ""]
    lines += [
        f"{summary['params'] / 1e6:.2f} M parameters, recipe `{summary['recipe'] or 'float'}`, "
        f"{summary['steps']} steps "
        f"of {summary['tokens_per_step']:,} tokens on {summary['device']} "
        f"({summary['tokens_per_second']:,.0f} tokens/s, median step "
        f"{summary['step_ms_median']:.1f} ms).",
        "",
        *markdown_table(("", _as_trained(summary), "packed, reloaded"), result_rows(summary)),
        "",
        "![loss](plots/loss.png)",
        "",
        "![weights](plots/weights.png)",
        "",
        "## Sample from the packed model",
        "",
        *fenced(sample),
        "",
        f"More: `{command}`",
        "",
        "## Layers",
        "",
        *fenced(layers),
        "",
        "## Config",
        "",
        f"`config.json` has every field; different from the defaults ({len(changed)}):",
        "",
        *fenced("\n".join(changed) or "nothing"),
        "",
        f"Corpus sha256 `{summary['corpus_sha256']}`, jax {summary['jax_version']}.",
    ]
    return "\n".join(lines) + "\n"


def markdown_table(header: tuple[str, ...], rows: Sequence[tuple[str, ...]]) -> list[str]:
    """Lines of a Markdown table; all columns but the first to the right."""
    rule = ["---"] + ["---:"] * (len(header) - 1)
    return ["| " + " | ".join(row) + " |" for row in (header, tuple(rule), *rows)]


def _as_trained(summary: dict[str, Any]) -> str:
    return "fake-quantized" if summary["recipe"] else "float"


def fenced(text: str) -> list[str]:
    """Lines of a Markdown code block with this text."""
    # Longer than any run of backticks inside, so that a sample cannot close its own fence.
    fence = "```"
    while fence in text:
        fence += "`"
    return [fence, text.rstrip("\n"), fence]
