"""PTQ of a CIFAR ResNet, judged by how often it agrees with the float model: no labels are needed.

    python -m experiments.resnet --model resnet20.th --images images.npz

Images: an npz with uint8 [n, 32, 32, 3] under its first name. The first `--calibration` images
calibrate, the others are classified by the float and by each quantized model. First and last layer
are 8 bit, and batch norms are folded first. `--out` writes the table as Markdown and JSON.
"""

import json
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from absl import flags
from flax import nnx

import lowbit_jax as lb
from experiments import runtime
from lowbit_jax import interop, ptq
from lowbit_jax.models import cifar_input
from lowbit_jax.reporting.report import markdown_table

_MODEL = flags.DEFINE_string("model", None, "A torch file of a CIFAR ResNet.", required=True)
_IMAGES = flags.DEFINE_string("images", None, "npz with uint8 images.", required=True)
_CALIBRATION = flags.DEFINE_integer("calibration", 1024, "Images to calibrate on.", lower_bound=64)
_STEPS = flags.DEFINE_integer("steps", 1000, "Steps of every reconstruction.", lower_bound=1)
_SCHEMES = flags.DEFINE_list("schemes", ["w4a16", "w3a16", "w2a16", "w4a4"], "Presets.")
_METHODS = flags.DEFINE_list("methods", [], "Some of the table's rows; default: all.")
_SEEDS = flags.DEFINE_list("seeds", ["0"], "Of the reconstructions.")
_OUT = flags.DEFINE_string("out", "", "Folder for the table.")

BATCH = 64


def methods(scheme: str, steps: int) -> dict[str, list[ptq.Stage]]:
    """The solvers that a scheme is tried with, the simplest first."""
    found: dict[str, list[ptq.Stage]] = {
        "round to nearest": [ptq.RoundToNearest()],
        "round to nearest, MSE": [ptq.RoundToNearest("mse")],
        "GPTQ, MSE": [ptq.GPTQ(range="mse")],
        "AdaRound": [ptq.AdaRound(steps)],
        "BRECQ": [ptq.BRECQ(steps, batch=32)],
        # As in the paper; the authors' program does so when asked.
        "BRECQ with Fisher weights": [ptq.BRECQ(steps, batch=32, objective="fisher")],
    }
    if scheme == "w4a4":
        found["QDrop"] = [ptq.QDrop(steps, batch=32)]
    return found


def chosen(found: dict[str, list[ptq.Stage]], names: Sequence[str]) -> dict[str, list[ptq.Stage]]:
    """The methods of these names, or all.

    Raises: ValueError: No method at all has one of the names.
    """
    known = methods("w4a4", 1)
    if unknown := [name for name in names if name not in known]:
        raise ValueError(f"--methods={unknown[0]}: is not of {list(known)}.")
    return {name: stages for name, stages in found.items() if not names or name in names}


def agreement(model: nnx.Module, images: np.ndarray, expected: np.ndarray) -> float:
    """Share of images that get the same class."""
    return float(np.mean(classes(model, images) == expected))


def classes(model: nnx.Module, images: np.ndarray) -> np.ndarray:
    """The class that a model gives every image."""
    apply = nnx.jit(lambda model, x: jnp.argmax(model(x), axis=-1))
    batches = [cifar_input(images[i : i + 500]) for i in range(0, len(images), 500)]
    return np.concatenate([np.asarray(apply(model, jnp.asarray(batch))) for batch in batches])


def quantized(
    model: nnx.Module, scheme: str, images: np.ndarray, pipeline: Sequence[ptq.Stage], seed: int
) -> nnx.Module:
    """The packed model."""
    starts = range(0, len(images), BATCH)
    inputs = [jnp.asarray(cifar_input(images[i : i + BATCH])) for i in starts]
    recipe = lb.Recipe(lb.Rule("conv|head", "w8a16"), lb.Rule(".*", scheme))
    stages = [ptq.FoldBatchNorm(), *pipeline]
    found, _ = ptq.run(model, recipe, inputs, stages, include=("conv", "head"), seed=seed)
    return lb.pack_model(found)


def main(argv: Sequence[str]) -> None:
    """Measures every method on every scheme."""
    del argv
    model = interop.load_model(_MODEL.value).model
    with np.load(_IMAGES.value) as file:
        images = file[file.files[0]]
    given, held_out = images[: _CALIBRATION.value], images[_CALIBRATION.value :]
    if not len(held_out):
        raise ValueError(f"--images: {len(images)} images leave none behind the calibration.")
    expected = classes(model, held_out)
    rows: list[dict[str, Any]] = []
    for scheme in _SCHEMES.value:
        for name, pipeline in chosen(methods(scheme, _STEPS.value), _METHODS.value).items():
            learned = any(isinstance(s, ptq.Reconstruction) for s in pipeline)
            seeds = [int(seed) for seed in _SEEDS.value] if learned else [0]
            found = []
            for seed in seeds:
                packed = quantized(model, scheme, given, pipeline, seed)
                found.append(agreement(packed, held_out, expected))
            spread = statistics.stdev(found) if len(found) > 1 else 0.0
            rows.append({"scheme": scheme, "method": name, "agreement": found, "spread": spread})
            print(f"{scheme}  {name}: {100 * statistics.mean(found):.2f} %", flush=True)
            jax.clear_caches()
    cells = [
        (
            row["scheme"],
            row["method"],
            f"{100 * statistics.mean(row['agreement']):.2f} %",
            f"{100 * row['spread']:.2f} %" if len(row["agreement"]) > 1 else "",
        )
        for row in rows
    ]
    text = "\n".join(markdown_table(("scheme", "method", "agreement", "spread"), cells))
    print(text)
    if _OUT.value:
        out = Path(_OUT.value)
        out.mkdir(parents=True, exist_ok=True)
        (out / "resnet.md").write_text(f"{len(held_out)} images.\n\n{text}\n")
        (out / "resnet.json").write_text(json.dumps(rows, indent=1))


if __name__ == "__main__":
    runtime.run(main)
