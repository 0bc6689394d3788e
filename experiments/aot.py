"""Compiles kernels for devices that are not there: python -m experiments.aot --out docs/benchmarks

Mosaic GPU kernels to Hopper's machine code, Mosaic TPU kernels to bundles of v5e, v6e and v7x.
Fails (exit code 1) where a kernel does not compile, spills registers, does not use the tensor core,
or takes more instructions or bundles than its budget in `deviceless/budgets.json`.

Needs the compilers of the extra `[aot]` (500 MB), best in an environment of its own:

    uv run --isolated --extra aot python -m experiments.aot --out docs/benchmarks
"""

import json
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Final

from absl import app, flags

from experiments.deviceless import bundles, sass

_DEVICES: Final = ("nvidia_h200", "tpu_v5_lite", "tpu_v6_lite", "tpu7x")
_BUDGETS: Final = Path(sass.__file__).parent / "budgets.json"
Row = dict[str, Any]


def main(argv: Sequence[str]) -> None:
    """Runs the job for the devices that the flags name."""
    if len(argv) > 1:
        raise app.UsageError(f"unexpected arguments: {argv[1:]}")
    rows = [row for device in flags.FLAGS.devices for row in compile_all(device)]
    judged = judge(rows, json.loads(_BUDGETS.read_text())["budgets"])
    text = table(judged)
    print(text)
    if flags.FLAGS.out:
        out = Path(flags.FLAGS.out)
        out.mkdir(parents=True, exist_ok=True)
        (out / "aot.md").write_text(text + "\n")
        (out / "aot.json").write_text(json.dumps(judged, indent=1) + "\n")
    if bad := [row for row in judged if row["verdict"] != "ok"]:
        raise SystemExit(f"{len(bad)} of {len(judged)} kernels are over their budgets or failed.")


def compile_all(device: str) -> list[Row]:
    """What the compilers say of every case of a device, in a process of its own."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        module = sass if device.startswith("nvidia") else bundles
        run = subprocess.run(
            [sys.executable, "-m", "experiments.deviceless.worker", device, name],
            env=module.environment(folder), stdout=subprocess.PIPE, text=True, check=True,
        )  # fmt: skip
    rows = [json.loads(line) for line in run.stdout.splitlines() if line.startswith("{")]
    if not rows:
        raise RuntimeError(f"{device}: nothing was compiled; the worker printed {run.stdout!r}.")
    return rows


def judge(rows: list[Row], budgets: dict[str, dict[str, Row]]) -> list[Row]:
    """Rows with their budget, the aim where there is one, and a verdict.

    Args:
        rows: As the worker prints them.
        budgets: By device and "name; tiles": {"budget": the most that passes, "aim": the figure
            of the prototype that the kernel was designed after, or null}.
    """
    judged = []
    for row in rows:
        entry = budgets.get(row["device"], {}).get(f"{row['name']}; {row['config']}")
        judged.append(row | (entry or {}) | {"verdict": _verdict(row, entry)})
    return judged


def _verdict(row: Row, entry: Row | None) -> str:
    if "error" in row:
        return f"failed: {row['error']}"
    if entry is None:
        return "has no budget"
    if row.get("spills"):
        return f"spills {row['spills']} bytes"
    if row["tensor"] and row.get("gmma") == 0:
        return "does not use the tensor core"
    if row["count"] > entry["budget"]:
        return f"over its budget of {entry['budget']:g}"
    return "ok"


def table(rows: list[Row]) -> str:
    """Markdown; counts per 64 x 128 weights (SASS) or 1024 x 512 weights (bundles) of products."""
    lines = [
        "Instructions of the inner loop of a warp (Hopper) and bundles of a step (TPU), compiled "
        "without a device. Products: per 64 x 128 and per 1024 x 512 weights.",
        "",
        "| device | kernel | tiles | count | budget | aim | registers | spills | verdict |",
        "|---|---|---|---:|---:|---:|---:|---:|---|",
    ]
    for row in rows:
        numbers = [row.get(key) for key in ("count", "budget", "aim", "registers", "spills")]
        cells = ["" if number is None else f"{number:.4g}" for number in numbers]
        lines.append(
            f"| {row['device']} | {row['name']} | {row['config']} | "
            + " | ".join(cells)
            + f" | {row['verdict']} |"
        )
    return "\n".join(lines)


if __name__ == "__main__":
    flags.DEFINE_list("devices", list(_DEVICES), "Which of them; names of tuning tables.")
    flags.DEFINE_string("out", None, "Folder for aot.md and aot.json.")
    app.run(main)
