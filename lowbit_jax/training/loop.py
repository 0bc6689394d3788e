"""Training, from a config to a finished run's folder; notebooks call `train` directly.

The order of one step: calibrate if due, step, and at its boundaries log, evaluate, checkpoint. A
checkpoint is written after everything else of its step, so a resumed run begins where the next
step would have.
"""

import dataclasses
import math
import statistics
from pathlib import Path
from typing import Any

import jax
from jax.sharding import Mesh
from rich.console import Console

from lowbit_jax.evaluation.evaluate import evaluate
from lowbit_jax.reporting.metrics import MetricsFile
from lowbit_jax.reporting.progress import TrainProgress
from lowbit_jax.training import build
from lowbit_jax.training import workdir as folders
from lowbit_jax.training.calibration import Calibration
from lowbit_jax.training.checkpoints import Checkpoints
from lowbit_jax.training.config import TrainConfig
from lowbit_jax.training.errors import CheckpointError, Interrupted, NotFinite
from lowbit_jax.training.finish import finish
from lowbit_jax.training.lag import OneStepLag
from lowbit_jax.training.mesh import batch_sharding, put_batch, state_shardings
from lowbit_jax.training.monitor import Codes, describe, initial_codes, make_monitor
from lowbit_jax.training.optimizer import make_optimizer
from lowbit_jax.training.schedule import learning_rate
from lowbit_jax.training.signals import StopRequest
from lowbit_jax.training.step import TrainState, make_train_step, merge, split


@dataclasses.dataclass
class Progress:
    """How far a run has come; what a checkpoint keeps of it beside the state.

    step: Updates done.
    window: Losses since the last log point, in nats per token.
    seconds: Time spent in steps, without evaluations and checkpoints, by all processes of this run.
    step_seconds: Median time of one step, by the process that wrote the checkpoint.
    """

    step: int = 0
    window: list[float] = dataclasses.field(default_factory=list)
    seconds: float = 0.0
    step_seconds: float = 0.0


def train(
    config: TrainConfig,
    workdir: str | Path,
    *,
    overwrite: bool = False,
    console: Console | None = None,
) -> dict[str, Any]:
    """Trains, packs, evaluates and samples what `config` says; returns the content of summary.json.

    Args:
        config: The run.
        workdir: Its folder; an unfinished run of the same config there is resumed.
        overwrite: Moves a run that is there already to `<workdir>.1` and starts anew.
        console: Where progress is shown; default: standard output.
    Raises:
        ValueError: A wrong config, corpus or workdir; nothing has been written then.
        Interrupted: SIGTERM or SIGINT; a checkpoint has been written.
        NotFinite, CheckpointError, DiskFull: see training/errors.py.
    """
    workdir, console = Path(workdir), console or Console()
    run = train_steps(config, workdir, overwrite=overwrite, console=console)
    return finish(
        config,
        workdir,
        model=merge(run.graphdef, run.state),
        text=run.text,
        sharding=batch_sharding(run.mesh),
        console=console,
        speed=run.speed(),
    )


def train_steps(
    config: TrainConfig, workdir: Path, *, overwrite: bool = False, console: Console
) -> "Run":
    """The first part of `train`: all its steps, without what is made of the model afterwards."""
    mesh = build.check(config)
    resuming = folders.inspect(config, workdir, overwrite=overwrite)
    run = Run(config, workdir, mesh, build.load_text(config), console)
    if not resuming and jax.process_index() == 0 and (moved := folders.claim(config, workdir)):
        run.say(f"The run that was in {workdir} is now in {moved}.")
    run.say(f"corpus {run.text.corpus}")
    with Checkpoints(workdir) as checkpoints:
        if resuming and checkpoints.steps():
            run.resume(checkpoints)
        run.steps(checkpoints)
    return run


class Run:
    """A run between its steps: the state on the mesh, and how far it is."""

    def __init__(
        self, config: TrainConfig, workdir: Path, mesh: Mesh, text: build.Text, console: Console
    ):
        self.config, self.workdir, self.mesh, self.text = config, workdir, mesh, text
        self.console = console
        self.progress = Progress()
        self._durations: list[float] = []
        vocab = text.tokenizer.vocab
        optimizer = make_optimizer(config.optim, config.steps)
        self.graphdef, state = split(build.build_model(config, vocab), optimizer)
        shardings = state_shardings(state, mesh)
        # A copy, because the step donates its argument, and `state` may share arrays with the
        # teacher.
        self.state: TrainState = jax.device_put(state, shardings, may_alias=False)
        self._monitor = make_monitor(self.graphdef)
        self.codes: Codes = initial_codes(self._monitor, self.graphdef, self.state)
        self._shardings = shardings
        self._step = make_train_step(
            self.graphdef,
            optimizer,
            accumulate=config.accumulate,
            teacher=build.load_teacher(config, vocab),
            shardings=shardings,
        )
        self._calibration = Calibration(self.graphdef, self.state, config.calibrate_every)

    def say(self, message: str) -> None:
        """A line on the screen, by one process only."""
        if jax.process_index() == 0:
            self.console.print(message, highlight=False, markup=False, soft_wrap=True)

    def resume(self, checkpoints: Checkpoints) -> None:
        """Goes to where the newest checkpoint was written."""
        step, restored, meta = checkpoints.restore({"train": self.state, "codes": self.codes})
        sha256 = self.text.corpus.sha256
        if meta["corpus_sha256"] != sha256:
            raise CheckpointError(
                f"{self.workdir}: this run's text was {meta['corpus_sha256']} (sha256) and now is "
                f"{sha256}; going on "
                "would not be the same run. Restore the text, or pass --overwrite or another "
                "--workdir."
            )
        self.state, self.codes = restored["train"], restored["codes"]
        self.progress = Progress(step, **meta["progress"])
        self.say(f"resuming {self.workdir} after step {step} of {self.config.steps}")

    def steps(self, checkpoints: Checkpoints) -> None:
        """Trains until the last step, or until a signal asks to stop."""
        config, progress = self.config, self.progress
        tokens = config.batch * config.length
        bar = TrainProgress(
            self.console, total=config.steps, start=progress.step, tokens_per_step=tokens
        )
        primary = jax.process_index() == 0
        with (
            MetricsFile(self.workdir, resume_step=progress.step, keep=primary) as metrics,
            StopRequest() as stop,
            bar,
        ):
            lag = OneStepLag(lambda step, read: self._note(step, read, bar, checkpoints))
            while progress.step < config.steps and stop.number is None:
                if self._calibration.due(progress.step):
                    batch = put_batch(self.text.batches[progress.step], self.mesh)
                    calibrated = self._calibration(self.state, batch, start=progress.step == 0)
                    self.state = jax.device_put(calibrated, self._shardings)
                batch = put_batch(self.text.batches[progress.step], self.mesh)
                self.state, read = self._step(self.state, batch)
                progress.step += 1
                lag.push(progress.step, read)
                self._boundary(metrics, checkpoints, bar, lag)
            lag.drain()
            if stop.number is not None:
                self._save(checkpoints, metrics)
                where = f"after step {progress.step}"
                raise Interrupted(stop.number, where, self.workdir / "checkpoints")

    def _boundary(
        self,
        metrics: MetricsFile,
        checkpoints: Checkpoints,
        bar: TrainProgress,
        lag: OneStepLag,
    ) -> None:
        config, step = self.config, self.progress.step
        last = step == config.steps
        log, evaluation, checkpoint = (
            last or step % every == 0
            for every in (config.log_every, config.eval_every, config.checkpoint_every)
        )
        if not (log or evaluation or checkpoint):
            return
        lag.drain()
        if log:
            metrics.write(self._train_row())
            bar.log(step, self._last_mean, self._tokens_per_second())
        if evaluation:
            row = self._evaluation_row()
            metrics.write(row)
            bar.note(f"step {step}: validation {row['nll']:.4f} nats per token")
        if checkpoint:
            self._save(checkpoints, metrics)
        lag.restart_clock()

    def _save(self, checkpoints: Checkpoints, metrics: MetricsFile) -> None:
        metrics.sync()
        progress = dataclasses.asdict(self.progress)
        meta = {"corpus_sha256": self.text.corpus.sha256, "progress": progress}
        step = progress.pop("step")
        checkpoints.save(step, {"train": self.state, "codes": self.codes}, meta)

    def _note(
        self,
        step: int,
        read: tuple[float, float, float],
        bar: TrainProgress,
        checkpoints: Checkpoints,
    ) -> None:
        loss, grad_norm, seconds = read
        if not (math.isfinite(loss) and math.isfinite(grad_norm)):
            saved = checkpoints.steps()
            kept = (
                f"The last good checkpoint, of step {saved[-1]}, is in {checkpoints.directory}."
                if saved
                else "No checkpoint had been written yet."
            )
            raise NotFinite(step, loss, grad_norm, kept)
        self._grad_norm = grad_norm
        self.progress.window.append(loss)
        self.progress.seconds += seconds
        self._durations.append(seconds)
        self.progress.step_seconds = statistics.median(self._durations)
        bar.update(step, loss, self._tokens_per_second())

    def _train_row(self) -> dict[str, Any]:
        window = self.progress.window
        self._last_mean = statistics.fmean(window)
        window.clear()
        self.codes, numbers = self._monitor(self.state, self.codes)
        return {
            "step": self.progress.step,
            "kind": "train",
            "loss": self._last_mean,
            "grad_norm": self._grad_norm,
            "lr": self._learning_rate(),
            "tokens_per_second": self._tokens_per_second(),
            **describe(self.codes, numbers),
        }

    def _evaluation_row(self) -> dict[str, Any]:
        config = self.config
        result = evaluate(
            merge(self.graphdef, self.state),
            self.text.valid_part(config.eval_batches, config),
            length=config.length,
            batch=config.batch,
            byte_count=self.text.tokenizer.byte_count,
            sharding=batch_sharding(self.mesh),
        )
        return {"step": self.progress.step, "kind": "eval"} | dataclasses.asdict(result)

    def _learning_rate(self) -> float:
        return float(learning_rate(self.config.optim, self.config.steps)(self.progress.step - 1))

    def _tokens_per_second(self) -> float:
        recent = self._durations[-50:]
        return self.config.batch * self.config.length / max(statistics.median(recent), 1e-9)

    def speed(self) -> dict[str, float]:
        """What summary.json says of the time."""
        seconds = max(self.progress.step_seconds, 1e-9)
        return {
            "step_ms_median": seconds * 1e3,
            "tokens_per_second": self.config.batch * self.config.length / seconds,
            "train_seconds": self.progress.seconds,
        }
