"""How a quantization goes and what came out: lines while it runs, the last table, report.md."""

from collections.abc import Mapping, Sequence
from types import TracebackType
from typing import Any, Self

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

from lowbit_jax.reporting.plots import human_bytes
from lowbit_jax.reporting.report import fenced, markdown_table

_LINE = "{:<34} {:>12} {:>12} {:>9} {:>9} {:>9}"
_HEADER = ("block, layer", "loss before", "after", "damping", "seconds", "memory")


class BlockProgress:
    """Shows the events of `ptq.run` as they come. Use as a context manager, pass as `on_event`.

    Args:
        console: Where to; without a terminal there are lines and no bar.
    """

    def __init__(self, console: Console, *, finished: int = 0):
        self._console = console
        self._finished = finished
        self._objective: tuple[Any, Any] = (None, None)
        self._bar = Progress(
            TextColumn("{task.description}"),
            BarColumn(bar_width=None),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            console=console,
            disable=not console.is_terminal,
            transient=True,
        )
        self._task = self._bar.add_task("calibrating", total=None)

    def __enter__(self) -> Self:
        self._bar.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._bar.stop()

    def __call__(self, event: Mapping[str, Any]) -> None:
        """Takes one event."""
        match event["kind"]:
            case "plan":
                self._plan(event)
            case "layer":
                self._layer(event)
            case "progress":
                shown = f"{event['stage']} {event['step']}/{event['steps']}"
                self._bar.update(self._task, description=shown)
                self._say(shown + (f"  KL {event['kl']:.5f}" if "kl" in event else ""))
            case "block":
                self._bar.advance(self._task)
                memory = human_bytes(event["peak_memory_bytes"])
                cells = ("", _number(event["output_error"]), "", f"{event['seconds']:.1f}", memory)
                self._say(_LINE.format(f"{event['block']}, output", *cells))
            case "message":
                self._say(f"note: {event['text']}")

    def _plan(self, event: Mapping[str, Any]) -> None:
        self._bar.update(self._task, total=event["blocks"], completed=self._finished)
        self._say(
            f"{event['layers']} layers in {event['blocks']} blocks; about "
            f"{human_bytes(event['memory_bytes'])} and {_duration(event['seconds'])}, without "
            "compilation"
        )
        if self._finished:
            self._say(f"going on after {self._finished} of {event['blocks']} blocks")
        self._say(_LINE.format(*_HEADER))

    def _layer(self, event: Mapping[str, Any]) -> None:
        self._bar.update(self._task, description=f"{event['block']} {event['layer']}")
        objective = (event.get("objective_first"), event.get("objective_last"))
        if "error_before" in event:
            self._say(_LINE.format(f"  {event['layer']}", *_losses(event), "", ""))
        elif objective[0] is not None and objective != self._objective:
            # What a block learned together is said once, not again with each of its layers.
            cells = (_number(objective[0]), _number(objective[1]), "", "", "")
            self._say(_LINE.format("  all layers, objective", *cells))
        self._objective = objective

    def _say(self, text: str) -> None:
        self._console.print(text.rstrip(), highlight=False, markup=False, soft_wrap=True)


def _losses(figures: Mapping[str, Any]) -> tuple[str, str, str]:
    before, after, damping = (
        _number(figures.get(name)) for name in ("error_before", "error_after", "damping")
    )
    return before, after, damping


def _number(value: float | None, digits: int = 3) -> str:
    return "" if value is None else f"{value:.{digits}g}"


def _duration(seconds: float) -> str:
    return f"{seconds:.0f} s" if seconds < 120 else f"{seconds / 60:.0f} min"


_POSITIONS = {
    "float": "float",
    "transformed": "transformed, not quantized",
    "fake_quant": "fake-quantized",
    "packed": "packed, reloaded",
}


def position_rows(summary: Mapping[str, Any]) -> list[tuple[str, str, str, str, str]]:
    """The loss at the four positions, the same lines for the screen and for the report."""
    base = summary["float"]["nll"]
    return [
        (
            words,
            f"{summary[name]['nll']:.5f}",
            f"{summary[name]['nll'] - base:+.5f}",
            f"{summary[name]['ppl']:.4f}",
            f"{summary[name]['kl']:.5f}",
        )
        for name, words in _POSITIONS.items()
    ]


_POSITION_HEADER = ("model", "nats/token", "over float", "perplexity", "KL")


def positions_table(summary: Mapping[str, Any]) -> Table:
    """The table that ends a run."""
    table = Table(title=f"{summary['method']}, {summary['scheme']}", title_justify="left")
    for number, name in enumerate(_POSITION_HEADER):
        table.add_column(name, justify="right" if number else "left", no_wrap=True)
    for row in position_rows(summary):
        table.add_row(*row)
    return table


def quantization_report(
    summary: Mapping[str, Any],
    rows: Sequence[Mapping[str, Any]],
    *,
    blocks: Sequence[Mapping[str, Any]],
    messages: Sequence[str],
    layers: str,
    changed: Sequence[str],
    sensitivity: str = "",
) -> str:
    """report.md as text.

    Args:
        summary: As in summary.json.
        rows: From `layer_rows`.
        blocks: Of the `ptq.Report`.
        messages: Of the `ptq.Report`.
        layers: `str(lb.summary(packed))`.
        changed: What in the config differs from the defaults, one line each.
        sensitivity: `str` of a `ptq.Sensitivity`, or "".
    """
    lines = [
        f"# {summary['config']}",
        "",
        f"`{summary['method']}`, scheme `{summary['scheme']}`, {summary['parameters'] / 1e6:.3g} M "
        f"parameters, {summary['seconds']:.1f} s on {summary['device']}, at most "
        f"{human_bytes(summary['peak_memory_bytes'])} of memory. "
        f"{human_bytes(summary['float_bytes'])} became {human_bytes(summary['packed_bytes'])} on "
        f"disk; a quantized weight takes {summary['bits_per_weight']:.3f} bits.",
        "",
        *markdown_table(_POSITION_HEADER, position_rows(summary)),
        "",
        f"{summary['evaluation_tokens']:,} tokens predicted. KL: of the float model's prediction "
        "from this one's, nats per token.",
        "",
        "## Layers",
        "",
        "Errors of the output are relative squared errors on the calibration data, before: rounded "
        "to nearest in the min-max range. Clipped: weights more than half a scale beyond the ends "
        "of their grid. Objective: of the learned variables, means of the first and the last tenth "
        "of the steps.",
        "",
        *markdown_table(_LAYER_HEADER, [_layer_row(row) for row in rows]),
        "",
        "![SQNR](plots/sqnr.png)",
        "",
        "## Blocks",
        "",
        *markdown_table(("block", "output error", "seconds", "peak memory"), _block_rows(blocks)),
        "",
    ]
    for title, body in (("What to know", messages), ("Sensitivity", [sensitivity])):
        if any(body):
            lines += [f"## {title}", "", *fenced("\n".join(body)), ""]
    lines += ["## Sizes", "", *fenced(layers), "", "## Config", ""]
    lines += ["`config.json` has every field; different from the defaults:", ""]
    lines += [*fenced("\n".join(changed) or "nothing"), ""]
    lines += [
        f"Calibration tokens sha256 `{summary['calibration_sha256']}`, jax "
        f"{summary['jax_version']}."
    ]
    return "\n".join(lines) + "\n"


_LAYER_HEADER = (
    "layer",
    "bits",
    "weights' SQNR, dB",
    "output error before",
    "after",
    "clipped",
    "damping",
    "objective first, last",
    "scheme",
)


def _layer_row(row: Mapping[str, Any]) -> tuple[str, ...]:
    before, after, damping = _losses(row)
    return (
        row["path"],
        f"{row['bits']:.2f}",
        f"{row['sqnr_db']:.1f}",
        before,
        after,
        f"{row['clipped']:.2%}",
        damping,
        ", ".join(filter(None, map(_number, map(row.get, ("objective_first", "objective_last"))))),
        row["scheme"],
    )


def _block_rows(blocks: Sequence[Mapping[str, Any]]) -> list[tuple[str, ...]]:
    return [
        (
            row["block"],
            _number(row["output_error"]),
            f"{row['seconds']:.1f}",
            human_bytes(row["peak_memory_bytes"]),
        )
        for row in blocks
    ]
