"""Saving and loading of packed models against a plain copy of the same bytes.

    python -m experiments.benchmark --suite checkpoint --params 1e9

Every preset takes processes of its own. A decoder of random words, whose arrays have the sizes that
a trained one's have, is saved to a new folder; a copy of one file of the same bytes is timed before
and after, on the same disk. A copy counts once its bytes are on the disk (fsync), as those of a
checkpoint are. Another process loads the checkpoint and reports how far its resident memory grew
beyond that before loading. The file cache is warm in both: what is measured is the software.
"""

import dataclasses
import gc
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
from absl import app, flags
from flax import nnx

import lowbit_jax as lb

SCHEMES = ("w4a16_g128", "w3a16_g128", "w1_58a16")
_BLOCK = 2**24  # bytes that a copy moves at a time


@dataclasses.dataclass(frozen=True)
class Shape:
    """A decoder without biases; embedding and head are small, so that packed layers dominate."""

    dim: int = 2048
    ffn_dim: int = 8192
    vocab: int = 512

    def layers(self, params: float) -> int:
        """How many layers have about this many parameters."""
        return max(1, round(params / (4 * self.dim**2 + 3 * self.dim * self.ffn_dim)))


@dataclasses.dataclass(frozen=True)
class Row:
    """What was measured of one preset; seconds are medians over the rounds, the first left out.

    Attributes:
        scheme: Preset.
        layers: Of the decoder.
        bytes: Of all arrays.
        copy: Seconds of a plain copy, until it is on the disk.
        copy_cached: Seconds of the same copy, until it is in the file cache.
        save: Seconds of `lb.checkpoint.save`.
        load: Seconds of `lb.checkpoint.load`.
        verified: Seconds of `lb.checkpoint.load(verify=True)`.
        memory: Bytes that the first load adds to the resident memory at its peak.
    """

    scheme: str
    layers: int
    bytes: int
    copy: float
    copy_cached: float
    save: float
    load: float
    verified: float
    memory: int


def measure(
    schemes: Sequence[str],
    *,
    params: float,
    rounds: int,
    folder: Path | None = None,
    shape: Shape | None = None,
) -> list[Row]:
    """One row per preset.

    Args:
        schemes: Presets.
        params: Parameters of the decoder, about.
        rounds: How often each is timed.
        folder: On the disk to measure; default: the system's temporary folder.
        shape: Of the decoder's layers.
    """
    shape = shape or Shape()
    rows = []
    for scheme in schemes:
        with tempfile.TemporaryDirectory(dir=folder) as place:
            job = {"scheme": scheme, "layers": shape.layers(params), "rounds": rounds}
            job |= {"place": place, "shape": dataclasses.asdict(shape)}
            result = _in_process("save", job) | _in_process("load", job)
        rows.append(Row(scheme=scheme, layers=shape.layers(params), **result))
    return rows


def table(rows: Sequence[Row]) -> str:
    """The rows as Markdown; throughput in MB/s, and in parts of the copy's in the same run."""
    lines = [
        "| preset | layers | MB | copy + fsync | copy | save | load | load, verified | memory |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        speeds = [f"{row.bytes / s / 1e6:.0f}" for s in (row.copy, row.copy_cached)]
        for seconds in (row.save, row.load, row.verified):
            speed = row.bytes / seconds / 1e6
            speeds.append(f"{speed:.0f} ({row.copy / seconds:.2f})")
        cells = [row.scheme, str(row.layers), f"{row.bytes / 1e6:.0f}", *speeds]
        cells.append(f"{row.memory / row.bytes:.3f} x")
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def random_model(scheme: str, layers: int, shape: Shape) -> nnx.Module:
    """A packed decoder whose arrays hold random bytes; its float form is never made."""
    config = lb.models.DecoderConfig(
        vocab=shape.vocab,
        dim=shape.dim,
        layers=layers,
        heads=shape.dim // 128,
        kv_heads=shape.dim // 128,
        ffn_dim=shape.ffn_dim,
        max_length=64,
    )

    def make() -> nnx.Module:
        float_model = lb.models.Decoder(config, rngs=nnx.Rngs(0))
        return lb.pack_model(lb.quantize_model(float_model, scheme))

    graphdef, state = nnx.split(nnx.eval_shape(make))
    rng = np.random.default_rng(0)

    def fill(leaf: Any) -> jax.Array:
        raw = rng.integers(0, 256, leaf.size * leaf.dtype.itemsize, np.uint8)
        return jax.device_put(raw.view(leaf.dtype).reshape(leaf.shape))

    return nnx.merge(graphdef, jax.tree.map(fill, state))


def _save(job: dict[str, Any]) -> dict[str, Any]:
    """Times copies and saves in turn; leaves a checkpoint behind."""
    place = Path(job["place"])
    model = random_model(job["scheme"], job["layers"], Shape(**job["shape"]))
    leaves = jax.tree.leaves(nnx.state(model))
    source = place / "bytes"
    with source.open("wb") as file:
        for leaf in leaves:
            file.write(np.ascontiguousarray(leaf).reshape(-1).view(np.uint8))
    seconds: dict[str, list[float]] = {"copy": [], "copy_cached": [], "save": []}
    for turn in range(job["rounds"] + 1):
        _drop(place / "copy", place / "checkpoint")
        start = time.perf_counter()
        cached = _copy(source, place / "copy")
        took = {"copy": time.perf_counter() - start, "copy_cached": cached}
        took["save"] = _seconds(lambda: lb.checkpoint.save(place / "checkpoint", model))
        if turn:
            for name, value in took.items():
                seconds[name].append(value)
    return {name: statistics.median(values) for name, values in seconds.items()} | {
        "bytes": sum(leaf.nbytes for leaf in leaves)
    }


def _load(job: dict[str, Any]) -> dict[str, Any]:
    """Memory of the first load of a process, and seconds of those that follow."""
    path = Path(job["place"]) / "checkpoint"
    jax.devices()  # the backend belongs to what was there before
    before = _status("VmRSS")
    model = lb.checkpoint.load(path)
    jax.block_until_ready(nnx.state(model))
    memory = _status("VmHWM") - before
    seconds: dict[str, list[float]] = {"load": [], "verified": []}
    for _ in range(job["rounds"]):
        for name, verify in (("load", False), ("verified", True)):
            del model
            gc.collect()
            start = time.perf_counter()
            model = lb.checkpoint.load(path, verify=verify)
            jax.block_until_ready(nnx.state(model))
            seconds[name].append(time.perf_counter() - start)
    return {name: statistics.median(values) for name, values in seconds.items()} | {
        "memory": memory
    }


def _copy(source: Path, target: Path) -> float:
    """Copies until the bytes are on the disk; returns the seconds until they are in the cache."""
    start = time.perf_counter()
    with source.open("rb") as read, target.open("wb") as write:
        shutil.copyfileobj(read, write, _BLOCK)
        write.flush()
        cached = time.perf_counter() - start
        os.fsync(write.fileno())
    return cached


def _drop(*paths: Path) -> None:
    """Removes files and folders, those that are there."""
    for path in paths:
        if path.is_dir():
            shutil.rmtree(path)
        else:
            path.unlink(missing_ok=True)


def _seconds(call: Callable[[], Any]) -> float:
    start = time.perf_counter()
    call()
    return time.perf_counter() - start


def _status(field: str) -> int:
    """A size of this process in bytes, as Linux counts it."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(f"{field}:"):
            return int(line.split()[1]) * 1024
    raise NotImplementedError(f"/proc/self/status has no {field}: memory is measured on Linux.")


def _in_process(part: str, job: dict[str, Any]) -> dict[str, Any]:
    command = [sys.executable, "-m", __name__, f"--part={part}", f"--job={json.dumps(job)}"]
    command += ["--verbosity=-1"]  # orbax's log of every step would be timed too
    run = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
    result: dict[str, Any] = json.loads(run.stdout.splitlines()[-1])
    return result


def main(argv: Sequence[str]) -> None:
    """One part of a measurement, in a process of its own."""
    del argv
    part = {"save": _save, "load": _load}[flags.FLAGS.part]
    print(json.dumps(part(json.loads(flags.FLAGS.job))))


if __name__ == "__main__":
    flags.DEFINE_enum("part", None, ["save", "load"], "Which part.", required=True)
    flags.DEFINE_string("job", None, "What to measure, as JSON.", required=True)
    app.run(main)
