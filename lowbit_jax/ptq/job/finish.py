"""The end of a run: pack, save, load what was saved, and measure the model at four positions.

Float, behind the transforms, fake-quantized, and packed: the loss at each tells where it was lost.
"""

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
from flax import nnx
from rich.console import Console
from rich.progress import Progress

import lowbit_jax as lb
from lowbit_jax.data import Tokenizer
from lowbit_jax.evaluation.divergence import Divergence, divergences
from lowbit_jax.ptq.job.config import QuantizeConfig
from lowbit_jax.ptq.job.layers import layer_rows
from lowbit_jax.ptq.job.pipelines import describe_method, describe_scheme
from lowbit_jax.ptq.job.text import Texts
from lowbit_jax.ptq.report import Report
from lowbit_jax.ptq.sensitivity import Sensitivity
from lowbit_jax.reporting.plots import plot_sqnr
from lowbit_jax.reporting.quantizing import positions_table, quantization_report
from lowbit_jax.training.fields import differences, to_dict
from lowbit_jax.training.finish import device_name, folder_bytes
from lowbit_jax.training.workdir import write_json, write_text


def finish(
    config: QuantizeConfig,
    workdir: Path,
    *,
    source_model: nnx.Module,
    tokenizer: Tokenizer,
    origin: Mapping[str, Any],
    model: nnx.Module,
    report: Report,
    texts: Texts,
    harm: Sensitivity | None,
    console: Console,
) -> dict[str, Any]:
    """Writes `packed/`, the plot, report.md and summary.json; shows the table of losses.

    Args:
        config: The run.
        workdir: Its folder.
        source_model: The float model.
        tokenizer: Its tokenizer.
        origin: Where it came from, JSON-able.
        model: With training twins, from `ptq.run`.
        report: From `ptq.run`.
        texts: The run's.
        harm: Of every layer, if it was measured.
        console: Where to.
    """
    packed = lb.pack_model(model)
    folder = workdir / "packed"
    # Replaces what this run left if it was killed between here and its summary.
    lb.checkpoint.save(
        folder,
        packed,
        metadata=checkpoint_metadata(config, origin, texts),
        tokenizer=tokenizer.to_json(),
        source_sha256=lb.checkpoint.digest(source_model),
        calibration_sha256=texts.calibration_sha256,
        overwrite=True,
    )
    measured = _evaluate(
        {
            "float": source_model,
            # Without transforms this is the float model itself, and is not evaluated twice.
            **({} if report.transformed is None else {"transformed": report.transformed}),
            "fake_quant": model,
            "packed": lb.prepare_model(lb.checkpoint.load(folder, verify=True)),
        },
        texts,
        console,
    )
    sizes = lb.summary(packed)
    summary = {
        "config": config.name,
        "method": describe_method(config),
        "scheme": describe_scheme(config),
        "float": _figures(measured["float"]),
        "transformed": _figures(measured.get("transformed", measured["float"])),
        "fake_quant": _figures(measured["fake_quant"]),
        "packed": _figures(measured["packed"]),
        "kl_per_token": measured["packed"].kl,
        "seconds": report.seconds,
        "peak_memory_bytes": report.peak_memory_bytes,
        "packed_bytes": folder_bytes(folder),
        "packed_array_bytes": sizes.bytes,
        "bits_per_weight": sizes.bits_per_weight,
        "float_bytes": lb.summary(source_model).float_bytes,
        "parameters": lb.summary(source_model).parameters,
        "calibration_tokens": sum(batch.size for batch in texts.calibration),
        "calibration_sha256": texts.calibration_sha256,
        "evaluation_tokens": measured["packed"].tokens,
        "evaluation_sha256": texts.evaluation_sha256,
        "model": dict(origin),
        "seed": config.seed,
        "messages": report.messages,
        "jax_version": jax.__version__,
        "device": device_name(),
    }
    if harm is not None:
        summary["sensitivity"] = harm.to_dict()
    rows = layer_rows(report.transformed or source_model, packed, report.layers)
    plot_sqnr(
        rows,
        workdir / "plots" / "sqnr.png",
        title=f"{config.name}, {summary['scheme']}",
    )
    text = quantization_report(
        summary,
        rows,
        blocks=report.blocks,
        messages=report.messages,
        layers=str(sizes),
        changed=differences(QuantizeConfig(name=config.name), config),
        sensitivity="" if harm is None else str(harm),
    )
    write_json(workdir / "layers.json", rows)
    write_text(workdir / "report.md", text)
    write_json(workdir / "summary.json", summary)
    console.print(positions_table(summary))
    generate = f"python -m experiments.generate --checkpoint {workdir}"
    console.print(
        f"{workdir / 'report.md'}; text: {generate}", markup=False, highlight=False, soft_wrap=True
    )
    return summary


def checkpoint_metadata(
    config: QuantizeConfig, origin: Mapping[str, Any], texts: Texts
) -> dict[str, Any]:
    """What stands beside the weights: how to read text with the model, and its origin."""
    return {
        "length": texts.calibration[0].shape[1],
        "separator": config.evaluation.separator or "\n\n",
        "model": dict(origin),
        "config": to_dict(config),
    }


def _evaluate(
    models: dict[str, nnx.Module], texts: Texts, console: Console
) -> dict[str, Divergence]:
    for model in models.values():
        model.eval()
    with Progress(console=console, transient=True, disable=not console.is_terminal) as bar:
        task = bar.add_task("evaluating", total=None)
        return divergences(
            models,
            texts.evaluation,
            on_batch=lambda done, total: bar.update(task, completed=done, total=total),
        )


def _figures(result: Divergence) -> dict[str, float]:
    figures = {"nll": result.nll, "ppl": result.ppl, "kl": result.kl}
    # JSON has no NaN, which is the error with a single row.
    known = math.isfinite(result.increase_se)
    return figures | ({"increase_se": result.increase_se} if known else {})
