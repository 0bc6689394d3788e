"""Post-training quantization from a config to a finished run's folder; notebooks call `quantize`.

config.json   what was asked for, written first
ptq/          the state of every finished block: a killed run goes on behind it
packed/       the packed model, its tokenizer beside it
plots/, report.md
summary.json  written last: the run is finished
"""

import dataclasses
from pathlib import Path
from typing import Any

import jax
from rich.console import Console

from lowbit_jax import ptq
from lowbit_jax.data import Tokenizer
from lowbit_jax.ptq.job.config import QuantizeConfig
from lowbit_jax.ptq.job.finish import finish
from lowbit_jax.ptq.job.pipelines import make_pipeline, make_recipe
from lowbit_jax.ptq.job.text import Texts, load_texts
from lowbit_jax.ptq.plan import make_plan
from lowbit_jax.ptq.sensitivity import Sensitivity, sensitivity
from lowbit_jax.reporting.quantizing import BlockProgress
from lowbit_jax.training import workdir as folders
from lowbit_jax.training.errors import Interrupted
from lowbit_jax.training.signals import StopRequest

DEFAULT_LENGTH = 256


@dataclasses.dataclass(frozen=True)
class Source:
    """A float model and how it reads text.

    model: Takes int32 tokens [rows, length]; has a `config` with `vocab` and `max_length`.
    tokenizer: Of its training.
    length: Tokens of a training sequence; 0 where it is not known.
    origin: Where it came from, JSON-able.
    """

    model: Any
    tokenizer: Tokenizer
    length: int = 0
    origin: dict[str, Any] = dataclasses.field(default_factory=dict)


def quantize(
    config: QuantizeConfig,
    source: Source,
    workdir: str | Path,
    *,
    overwrite: bool = False,
    console: Console | None = None,
) -> dict[str, Any]:
    """Quantizes, packs and evaluates what `config` says; returns the content of summary.json.

    Args:
        config: The run; `config.model` is recorded, the model itself comes with `source`.
        source: The float model.
        workdir: The run's folder; an unfinished run of the same config there is resumed.
        overwrite: Moves a run that is there already to `<workdir>.1` and starts anew.
        console: Where progress is shown; default: standard output.

    Raises:
        ValueError, OSError: A wrong config, text, model or workdir; nothing has been written then.
        NotImplementedError, MemoryError, FloatingPointError: See `ptq.run`.
        Interrupted: SIGTERM or SIGINT; what was finished is in the workdir.
    """
    workdir, console = Path(workdir), console or Console()
    check_sizes(config)
    pipeline, recipe = make_pipeline(config, source.tokenizer.bos), make_recipe(config)
    include = tuple(filter(None, map(str.strip, config.include.split(","))))
    make_plan(source.model, recipe, config.blocks, include)
    resuming = folders.inspect(config, workdir, overwrite=overwrite)
    texts = read_texts(config, source)
    if not resuming and (moved := folders.claim(config, workdir)):
        _say(console, f"The run that was in {workdir} is now in {moved}.")
    harm = _sensitivity(config, source, texts, console) if config.sensitivity else None
    state = workdir / "ptq"
    blocks = state / "blocks"
    finished = len([p for p in blocks.iterdir() if p.name.isdigit()]) if blocks.is_dir() else 0
    with StopRequest() as request, BlockProgress(console, finished=finished) as progress:
        model, report = _run(
            request,
            state,
            source.model,
            recipe,
            texts.calibration,
            pipeline,
            config.blocks,
            include=include,
            seed=config.seed,
            memory_limit=int(config.memory_limit_gb * 1e9) or None,
            # Where there is no transform the float model itself is what was quantized.
            keep_transformed=any(stage.transforms for stage in pipeline),
            on_event=progress,
            stop=lambda: request.number is not None,
        )
    return finish(
        config,
        workdir,
        source_model=source.model,
        tokenizer=source.tokenizer,
        origin=source.origin,
        model=model,
        report=report,
        texts=texts,
        harm=harm,
        console=console,
    )


def _run(request: StopRequest, state: Path, *args: Any, **named: Any) -> Any:
    """`ptq.run` with its state in a folder, a stop turned into the signal that asked for it."""
    try:
        return ptq.run(*args, workdir=state, **named)
    except ptq.Stopped as stopped:
        assert request.number is not None
        raise Interrupted(request.number, f"({stopped})", state) from stopped


def check_sizes(config: QuantizeConfig) -> None:
    """Raises ValueError for sizes that no run can have; names all of them."""
    calibration, evaluation = config.calibration, config.evaluation
    least = {
        "calibration.sequences": (calibration.sequences, 1),
        "calibration.batch": (calibration.batch, 1),
        "calibration.documents": (calibration.documents, 0),
        "calibration.length": (calibration.length, 0),
        "evaluation.sequences": (evaluation.sequences, 0),
        "evaluation.batch": (evaluation.batch, 1),
        "evaluation.length": (evaluation.length, 0),
        "memory_limit_gb": (config.memory_limit_gb, 0),
    }
    wrong = [
        f"{name}={value} is below {low}" for name, (value, low) in least.items() if value < low
    ]
    if evaluation.length == 1:
        wrong.append("evaluation.length=1 leaves nothing to predict")
    if wrong:
        raise ValueError(f"config: {'; '.join(wrong)}.")


def read_texts(config: QuantizeConfig, source: Source) -> Texts:
    """Both texts of a run; an evaluation without a length has that of the calibration."""
    model = source.model.config
    usual = config.calibration.length or source.length or min(DEFAULT_LENGTH, model.max_length)
    return load_texts(
        config.calibration,
        config.evaluation,
        source.tokenizer,
        vocab=model.vocab,
        max_length=model.max_length,
        default_length=usual,
    )


def _sensitivity(
    config: QuantizeConfig, source: Source, texts: Texts, console: Console
) -> Sensitivity:
    found = sensitivity(source.model, texts.calibration[:2], blocks=config.blocks)
    _say(console, str(found))
    return found


def _say(console: Console, text: str) -> None:
    if jax.process_index() == 0:
        console.print(text, highlight=False, markup=False, soft_wrap=True)
