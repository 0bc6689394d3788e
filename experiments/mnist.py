"""The papers' tables on MNIST: every row trained with several seeds, fake-quantized and packed.

    python -m experiments.mnist --data mnist.npz --out runs/mnist
    python -m experiments.mnist --data hf:ylecun/mnist --rows twn,lenet-float

Rows are in `mnist_rows`; each takes up to half an hour for three seeds on two cores. Every run is
a folder, `<row>-seed<seed>`, with config.json, summary.json and the packed model; a finished run
is not trained again, so that the table can be stopped at any moment and goes on where it was.
mnist.md and mnist.json are written anew behind each run, from those that are finished. `--smoke`
trains one epoch on a few hundred images.
"""

import dataclasses
import hashlib
import json
import math
import statistics
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import jax
from absl import flags
from flax import nnx
from jaxtyping import Array

import lowbit_jax as lb
from experiments import mnist_rows, runtime
from experiments.mnist_rows import Row
from lowbit_jax.data.images import ImageData, load_images
from lowbit_jax.models import MLP, LeNet, MLPConfig
from lowbit_jax.reporting.report import markdown_table
from lowbit_jax.training import workdir
from lowbit_jax.training.classifier import Epoch, error, train_classifier


def table(rows: Sequence[Row], data: ImageData, out: Path, seeds: Sequence[int]) -> str:
    """Runs what is missing and returns the table as Markdown.

    Raises: ValueError: Images that a row's network does not take, or a folder of another config.
    """
    for row in rows:
        check_fits(row, data)
    out.mkdir(parents=True, exist_ok=True)
    for row in rows:
        for seed in seeds:
            run(row, data, out / f"{row.name}-seed{seed}", seed)
            write(rows, out, seeds)
        jax.clear_caches()
    return write(rows, out, seeds)


def run(row: Row, data: ImageData, folder: Path, seed: int) -> dict[str, Any]:
    """The summary of one run; it is trained only if it is not finished.

    Raises: ValueError: The folder holds a run of another config.
    """
    config = {
        "recipe": row.recipe,
        **{f"model.{name}": value for name, value in dataclasses.asdict(row.model).items()},
        **{f"training.{name}": value for name, value in dataclasses.asdict(row.training).items()},
        "seed": seed,
        "data": fingerprint(data),
    }
    config = json.loads(json.dumps(config))  # as it is read again: tuples are lists
    path, summary = folder / "config.json", folder / "summary.json"
    if path.exists() and (found := json.loads(path.read_text())) != config:
        keys = [key for key in {**found, **config} if found.get(key) != config.get(key)]
        changed = [f"{key}: {found.get(key)!r} -> {config.get(key)!r}" for key in keys]
        raise ValueError(
            f"{folder}: holds a run of another config; what differs (there -> here):\n  "
            + "\n  ".join(changed)
            + "\nPass another --out, or remove the folder."
        )
    if summary.exists():
        return json.loads(summary.read_text())
    folder.mkdir(parents=True, exist_ok=True)
    workdir.write_json(path, config)
    measured = measure(row, data, folder, seed)
    workdir.write_json(summary, measured)
    return measured


def measure(row: Row, data: ImageData, folder: Path, seed: int) -> dict[str, Any]:
    """Trains a row with one seed; errors are of the test images, in percent."""
    recipe = lb.Recipe.from_string(row.recipe)
    model = build(row, seed)
    if recipe is not None:
        model = lb.quantize_model(model, recipe)

    def show(epoch: Epoch) -> None:
        wrong = epoch.validation_error
        valid = "" if math.isnan(wrong) else f"validation error {wrong:.2f} %, "
        print(
            f"{folder.name}  epoch {epoch.number}/{row.training.epochs}: loss {epoch.loss:.4f}, "
            f"{valid}{epoch.seconds:.1f} s",
            flush=True,
        )

    trained = train_classifier(model, forward, data.train, row.training, seed=seed, on_epoch=show)
    summary: dict[str, Any] = {
        "row": row.name,
        "seed": seed,
        "error": error(trained.model, forward, data.test),
        "packed_error": None,
        "bits_per_weight": 32.0,
        "bytes": lb.summary(trained.model).float_bytes,
        "epoch": trained.best,
        "seconds": sum(epoch.seconds for epoch in trained.history),
        "losses": [epoch.loss for epoch in trained.history],
    }
    if recipe is not None:
        packed = lb.pack_model(trained.model)
        size = lb.summary(packed)
        summary |= {
            "packed_error": error(packed, forward, data.test),
            "bits_per_weight": size.bits_per_weight,
            "bytes": size.bytes,
        }
        lb.checkpoint.save(folder / "packed", packed, overwrite=True)
    return summary


def build(row: Row, seed: int) -> nnx.Module:
    """The float network of a row."""
    if isinstance(row.model, MLPConfig):
        return MLP(row.model, rngs=nnx.Rngs(seed))
    return LeNet(row.model, rngs=nnx.Rngs(seed))


def forward(model: Any, images: Array) -> Array:
    """Scores; an MLP takes an image as one row."""
    if isinstance(model.config, MLPConfig):
        images = images.reshape(images.shape[0], -1)
    return model(images)


def check_fits(row: Row, data: ImageData) -> None:
    """Raises ValueError if a row's network does not take these images, or has too few classes."""
    height, width, channels = data.train.images.shape[1:]
    if isinstance(row.model, MLPConfig):
        fits = row.model.in_features == height * width * channels
    else:
        fits = (row.model.size, row.model.size, row.model.in_channels) == (height, width, channels)
    if not fits or row.model.out_features < data.classes:
        raise ValueError(
            f"--data: images of {height} x {width} pixels, {channels} channels and "
            f"{data.classes} classes do not fit the row {row.name!r}: {row.model}."
        )


def fingerprint(data: ImageData) -> str:
    """Changes with any image or label."""
    digest = hashlib.sha256()
    for split in (data.train, data.test):
        for array in (split.images, split.labels):
            digest.update(f"{array.dtype} {array.shape}".encode())
            digest.update(array.tobytes())
    return digest.hexdigest()[:16]


def write(rows: Iterable[Row], out: Path, seeds: Iterable[int]) -> str:
    """Writes mnist.md and mnist.json from the runs that are finished; returns the former."""
    cells, results, notes = [], [], []
    seeds = list(seeds)
    for row in rows:
        files = [out / f"{row.name}-seed{seed}" / "summary.json" for seed in seeds]
        found = [json.loads(file.read_text()) for file in files if file.exists()]
        if not found:
            continue
        result = combine(row, found)
        results.append(result)
        notes.append(f"- {row.title}: {row.note}.")
        reached = {None: "", True: "yes", False: "no"}[result["reached"]]
        cells.append(
            (
                row.title,
                row.paper,
                "" if row.figure is None else f"{row.figure:.2f}",
                _spread(result["error"]),
                _spread(result["packed_error"]),
                f"{found[0]['bits_per_weight']:.2f}",
                str(row.training.epochs),
                str(len(found)),
                f"{statistics.mean(run['seconds'] for run in found) / 60:.1f}",
                reached,
            )
        )
    header = (
        "network", "paper", "error there, %", "error here, %", "packed, %", "bits per weight",
        "epochs", "seeds", "minutes a seed", "within paper + 2 std",
    )  # fmt: skip
    text = "\n".join([*markdown_table(header, cells), "", *notes]) + "\n"
    workdir.write_text(out / "mnist.md", text)
    workdir.write_json(out / "mnist.json", results)
    return text


def combine(row: Row, runs: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Means and sample standard deviations of a row's runs.

    `reached`: whether what would be deployed (packed, or float) errs by at most the paper's figure
    and two standard deviations of ours; None where there is no figure or a single run.
    """
    result: dict[str, Any] = {"row": row.name, "figure": row.figure, "runs": list(runs)}
    for key in ("error", "packed_error"):
        values = [run[key] for run in runs if run[key] is not None]
        spread = statistics.stdev(values) if len(values) > 1 else None
        result[key] = {"mean": statistics.mean(values), "std": spread} if values else None
    deployed = result["packed_error"] or result["error"]
    known = row.figure is not None and deployed["std"] is not None
    result["reached"] = deployed["mean"] <= row.figure + 2 * deployed["std"] if known else None
    return result


def _spread(value: dict[str, Any] | None) -> str:
    if value is None:
        return ""
    return f"{value['mean']:.2f}" + ("" if value["std"] is None else f" ± {value['std']:.2f}")


def smoke(row: Row) -> Row:
    """The row for one epoch on what `few` leaves."""
    validation = min(row.training.validation, 128)
    training = dataclasses.replace(row.training, epochs=1, batch=64, validation=validation)
    return dataclasses.replace(row, training=training)


def few(data: ImageData) -> ImageData:
    """The first 512 images for training, and 256 for the test."""
    return dataclasses.replace(data, train=data.train[:512], test=data.test[:256])


def chosen(names: Sequence[str], *, epochs: int, convolution: str) -> list[Row]:
    """The rows of these names, or all, with flags applied. Raises: ValueError: An unknown name."""
    known = {row.name: row for row in mnist_rows.rows()}
    if unknown := sorted(set(names) - set(known)):
        raise ValueError(f"--rows: {unknown} are no rows; those are {list(known)}.")
    rows = []
    for row in (known[name] for name in names or known):
        model, training = row.model, row.training
        if not isinstance(model, MLPConfig):
            model = dataclasses.replace(model, convolution=convolution)
        if epochs:
            training = dataclasses.replace(training, epochs=epochs)
        rows.append(dataclasses.replace(row, model=model, training=training))
    return rows


def main(argv: Sequence[str]) -> None:
    """Runs the rows that the flags name."""
    del argv
    rows = chosen(flags.FLAGS.rows, epochs=flags.FLAGS.epochs, convolution=flags.FLAGS.convolution)
    data = load_images(flags.FLAGS.data)
    if flags.FLAGS.smoke:
        rows, data = [smoke(row) for row in rows], few(data)
    print(table(rows, data, Path(flags.FLAGS.out), [int(seed) for seed in flags.FLAGS.seeds]))


if __name__ == "__main__":
    flags.DEFINE_string("data", None, "PATH.npz or hf:NAME.", required=True)
    flags.DEFINE_list("rows", [], "Names of rows; none: all.")
    flags.DEFINE_list("seeds", ["0", "1", "2"], "Seeds of every row.")
    flags.DEFINE_integer("epochs", 0, "Epochs of every run; 0: those of its row.")
    flags.DEFINE_enum(
        "convolution", "patches", ["patches", "xla"], "How LeNet computes its convolutions."
    )
    flags.DEFINE_bool("smoke", False, "One epoch on a few hundred images.")
    flags.DEFINE_string("out", "runs/mnist", "Folder of all runs and of mnist.md.")
    runtime.run(main)
