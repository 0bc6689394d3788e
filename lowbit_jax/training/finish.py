"""The end of a run: pack, save, load what was saved, and measure both models on the same text.

Nothing here is needed to resume: a run killed in the middle does it again from its last
checkpoint. summary.json is written last, and says that the run is finished.
"""

import statistics
import time
from pathlib import Path
from typing import Any

import jax
import numpy as np
from flax import nnx
from rich.console import Console

import lowbit_jax as lb
from lowbit_jax.evaluation.evaluate import Evaluation, evaluate
from lowbit_jax.generation import stream_text
from lowbit_jax.reporting.metrics import read_metrics
from lowbit_jax.reporting.plots import plot_loss, plot_weights
from lowbit_jax.reporting.report import report, result_table
from lowbit_jax.training.build import Text
from lowbit_jax.training.config import TrainConfig
from lowbit_jax.training.fields import differences, to_dict
from lowbit_jax.training.weights import weight_samples
from lowbit_jax.training.workdir import write_json, write_text


def finish(
    config: TrainConfig,
    workdir: Path,
    *,
    model: nnx.Module,
    text: Text,
    sharding: jax.sharding.Sharding,
    console: Console,
    speed: dict[str, float],
) -> dict[str, Any]:
    """Writes `packed/`, plots, report.md and summary.json; shows a table and a sample.

    Args:
        config: The run.
        workdir: Its folder.
        model: As trained.
        text: The run's.
        sharding: Of a batch.
        console: Where to.
        speed: Further fields of the summary, about the time of a step.
    """
    model.eval()
    trained = _evaluate(config, model, text, sharding)
    packed = lb.pack_model(model) if config.recipe else model
    folder = workdir / "packed"
    # Replaces what this run left if it was killed between here and its summary.
    lb.checkpoint.save(
        folder,
        packed,
        metadata=checkpoint_metadata(config, text),
        tokenizer=text.tokenizer.to_json(),
        overwrite=True,
    )
    reloaded = lb.checkpoint.load(folder, verify=True)
    reloaded = lb.prepare_model(reloaded) if config.recipe else reloaded
    reloaded.eval()
    after = _evaluate(config, reloaded, text, None)
    sizes = lb.summary(model)
    summary = {
        "config": config.name,
        "recipe": config.recipe,
        "steps": config.steps,
        "tokens": config.steps * config.batch * config.length,
        "tokens_per_step": config.batch * config.length,
        "params": sizes.parameters,
        "valid": _figures(trained),
        "packed": {
            "valid_nll": after.nll,
            "bits_per_byte": after.bits_per_byte,
            "ppl": after.ppl,
            "bytes": folder_bytes(folder),
            "bits_per_weight": sizes.bits_per_weight,
            "forward_tokens_per_second": forward_speed(reloaded, config),
        },
        "float_bytes": sizes.float_bytes,
        "forward_tokens_per_second": forward_speed(model, config),
        **speed,
        "corpus_sha256": text.corpus.sha256,
        "jax_version": jax.__version__,
        "device": device_name(),
    }
    sample = sample_text(config, reloaded, text)
    if jax.process_index() == 0:
        rows = read_metrics(workdir)
        plots = workdir / "plots"
        plot_loss(rows, plots / "loss.png", title=config.name)
        title = f"{config.name}: weights after {config.steps} steps"
        plot_weights(weight_samples(model), plots / "weights.png", title=title)
        generate = "python -m experiments.generate"
        command = f'{generate} --checkpoint {workdir} --prompt "{config.sample_prompt}"'
        changed = differences(TrainConfig(name=config.name), config)
        write_text(
            workdir / "report.md",
            report(
                summary,
                layers=str(lb.summary(reloaded)),
                sample=sample,
                changed=changed,
                command=command,
            ),
        )
        write_json(workdir / "summary.json", summary)
        console.print(result_table(summary))
        console.print(f"\n{sample}\n", highlight=False, markup=False)
        console.print(
            f"{workdir / 'report.md'}; more text: {command}", markup=False, soft_wrap=True
        )
    return summary


def folder_bytes(folder: Path) -> int:
    """Bytes of all files under `folder`."""
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


def forward_speed(model: nnx.Module, config: TrainConfig, repeats: int = 5) -> float:
    """Tokens per second of the compiled forward pass of one batch, on one device; a median."""
    graphdef, state = nnx.split(model)
    state = jax.device_put(state, jax.devices()[0])
    forward = jax.jit(lambda state, tokens: nnx.merge(graphdef, state)(tokens))
    tokens = np.zeros((config.batch, config.length), np.int32)
    forward(state, tokens).block_until_ready()
    seconds = []
    for _ in range(repeats):
        start = time.perf_counter()
        forward(state, tokens).block_until_ready()
        seconds.append(time.perf_counter() - start)
    return tokens.size / statistics.median(seconds)


def sample_text(config: TrainConfig, model: Any, text: Text) -> str:
    """The prompt and `sample_length` tokens more, fewer where the model's context ends."""
    prompt = config.sample_prompt
    room = config.model.max_length - len(text.tokenizer.encode(prompt))
    if min(room, config.sample_length) < 1:
        return prompt
    pieces = stream_text(
        model,
        text.tokenizer,
        prompt,
        min(room, config.sample_length),
        key=jax.random.key(config.seed),
        temperature=config.sample_temperature,
    )
    return prompt + "".join(pieces)


def checkpoint_metadata(config: TrainConfig, text: Text) -> dict[str, Any]:
    """What stands beside the weights: how to read text with the model, and its origin."""
    return {
        "length": config.length,
        "separator": config.data.separator,
        "corpus": text.corpus.summary(),
        "config": to_dict(config),
    }


def _evaluate(config: TrainConfig, model: nnx.Module, text: Text, sharding: Any) -> Evaluation:
    return evaluate(
        model,
        text.valid_part(config.final_batches, config),
        length=config.length,
        batch=config.batch,
        byte_count=text.tokenizer.byte_count,
        sharding=sharding,
    )


def _figures(result: Evaluation) -> dict[str, Any]:
    return {
        "nll": result.nll,
        "bits_per_byte": result.bits_per_byte,
        "ppl": result.ppl,
        "tokens": result.tokens,
        "length": result.length,
    }


def device_name() -> str:
    """Kind and number of the devices, for reports."""
    devices = jax.devices()
    return f"{devices[0].device_kind} x {len(devices)} ({devices[0].platform})"
