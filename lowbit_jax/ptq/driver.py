"""The calibration driver: a float model in, a quantized one out, block by block.

    model, report = ptq.run(model, "w4a16_g128", batches, pipeline=[GPTQ(order="activation")])

What enters the first block is captured once. Then, block by block: transforms rewrite it, a solver
chooses its codes, and both activation chains (of the float and of the quantized model) move on
behind it. One block's working set is in memory at a time; blocks of equal structure share their
compiled programs. With a `workdir`, a run that is killed goes on at its block, with both chains.
"""

import functools
import gc
import time
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from lowbit_jax.models.wiring import Wiring
from lowbit_jax.ptq import resume
from lowbit_jax.ptq.chain import Chain, capture
from lowbit_jax.ptq.estimate import check_memory, estimate
from lowbit_jax.ptq.fisher import squared_gradients
from lowbit_jax.ptq.outside import quantize_outside
from lowbit_jax.ptq.plan import make_plan
from lowbit_jax.ptq.report import Event, Report, Reporter, peak_memory_bytes
from lowbit_jax.ptq.stage import BlockWork, ModelWork, Stage
from lowbit_jax.ptq.unfinished import Unfinished, never
from lowbit_jax.recipe import Recipe
from lowbit_jax.walk import layers, rebuilt


def _call(model: nnx.Module, batch: Any) -> Any:
    return model(batch)  # type: ignore[operator]


def run(
    model: nnx.Module,
    recipe: Recipe | str,
    batches: Iterable[Any],
    pipeline: Sequence[Stage],
    blocks: str = r"layers/\d+",
    *,
    include: Sequence[str] = (),
    forward: Callable[[nnx.Module, Any], Any] = _call,
    wiring: Wiring | None = None,
    seed: int = 0,
    workdir: str | Path | None = None,
    memory_limit: int | None = None,
    keep_transformed: bool = False,
    on_event: Callable[[Event], None] | None = None,
    stop: Callable[[], bool] = never,
) -> tuple[nnx.Module, Report]:
    """Quantizes a trained model without retraining it.

    Args:
        model: Any float NNX model whose blocks follow each other; it is left untouched.
        recipe: Rules over the layers of the blocks, or a preset's name for all of them.
        batches: Calibration data, as `forward` takes it; all of it is held.
        pipeline: Transforms, then a solver, then refinements.
        blocks: Pattern that matches the whole path of every block.
        include: Paths of layers outside the blocks over which the recipe ranges too; they are
            rounded to nearest, in ranges of least error.
        forward: Runs a model on a batch.
        wiring: Which layer feeds which, for transforms of a user's own model.
        seed: Of everything random; the same seed gives the same bits on the same machine.
        workdir: Where the state of every finished block is kept, and that of a long fit every
            minute; a run of the same arguments there goes on where it stopped.
        memory_limit: Bytes; default what the machine has available.
        keep_transformed: Whether the report keeps the float model behind the transforms.
        on_event: Called with every event of the report as it comes.
        stop: Asked between stages and every few steps of a fit; once it is true, the run keeps
            what it has and raises `Stopped`.

    Returns: The model with training twins (`lb.pack_model` packs it), and the report.

    Raises:
        ValueError: Wrong blocks, recipe, batches or pipeline; a state that belongs to another run.
        NotImplementedError: A layer without a twin, blocks that return several arrays.
        MemoryError: It would not fit; nothing was done.
        FloatingPointError: A block makes NaN or infinities of its inputs.
        Stopped: `stop` asked for it.
    """
    started = time.monotonic()
    batches = list(batches)
    plan = make_plan(model, recipe, blocks, include, wiring)
    if not pipeline:
        raise ValueError("ptq.run: the pipeline is empty. Give at least [RoundToNearest()].")
    root = jax.random.key(seed)
    folder = None if workdir is None else Path(workdir)
    state = resume.State.open(
        folder, resume.fingerprint(model, plan.schemes, batches, pipeline, blocks, seed)
    )
    unfinished = Unfinished(state.fits, stop)
    reporter = Reporter(state.log, on_event)
    reporter.report.layers, reporter.report.blocks = state.rows("layer"), state.rows("block")
    reporter.report.messages = [row["text"] for row in state.rows("message")]

    def whole(changed: nnx.Module, number: int, *, behind: bool) -> ModelWork:
        here = unfinished.tagged(
            f"the whole model {'behind' if behind else 'before'} its blocks, stage {number}"
        )
        here.check()
        return ModelWork(
            model=changed,
            reference=model,
            schemes=plan.schemes,
            batches=batches,
            forward=forward,
            key=jax.random.fold_in(root, 10_000 + 1000 * behind + number),
            wiring=plan.wiring,
            note=reporter.note(""),
            emit=reporter.emit,
            unfinished=here,
        )

    prepared = model
    for number, stage in enumerate(pipeline):
        prepared = stage.prepare(whole(prepared, number, behind=False))
    outer = quantize_outside(prepared, plan.outside())
    chain = capture(prepared, plan.blocks, batches, forward)
    chain_hat = chain if outer is prepared else capture(outer, plan.blocks, batches, forward)
    cost = estimate(prepared, plan, chain, pipeline)
    reporter.emit("plan", blocks=len(plan.blocks), layers=len(plan.schemes), **cost)
    check_memory(cost["memory_bytes"], memory_limit)

    resumed = state.finished
    done: dict[str, nnx.Module] = {}
    transformed: dict[str, nnx.Module] = {}
    floats = {name: dict(layers(prepared))[name] for name in plan.blocks}
    for number, name in enumerate(plan.blocks):
        loaded = state.load(number, floats[name], plan.inside(name), keep_transformed)
        if loaded is not None:
            done[name], transformed[name] = loaded
            continue
        if number and number == resumed:
            chain, chain_hat = state.chains(chain, chain_hat)
        work = BlockWork(
            name=name,
            original=floats[name],
            schemes=plan.inside(name),
            chain=chain,
            chain_hat=chain_hat,
            key=jax.random.fold_in(root, number),
            wiring=plan.wiring,
            note=reporter.note(name),
            fisher=functools.partial(squared_gradients, prepared, name, batches, forward, root),
            unfinished=unfinished,
        )
        done[name], chain, chain_hat = _block(work, pipeline, reporter)
        transformed[name] = work.original if keep_transformed else done[name]
        state.save(number, done[name], work.original, keep_transformed, chain, chain_hat)
        del work
        gc.collect()  # modules refer to each other in circles, and hold arrays until it runs

    quantized = rebuilt(outer, lambda path, module: done.get(path, module))
    for number, stage in enumerate(pipeline):
        quantized = stage.finish(whole(quantized, number, behind=True))
    report = reporter.report
    if keep_transformed:
        report.transformed = rebuilt(prepared, lambda path, m: transformed.get(path, m))
    report.seconds = time.monotonic() - started + state.seconds
    report.peak_memory_bytes = peak_memory_bytes()
    reporter.emit("done", seconds=report.seconds, peak_memory_bytes=report.peak_memory_bytes)
    return quantized, report


def _block(
    work: BlockWork, pipeline: Sequence[Stage], reporter: Reporter
) -> tuple[nnx.Module, Chain, Chain]:
    """Runs the pipeline on one block; returns it quantized, and the chains behind it."""
    started = time.monotonic()
    unfinished = work.unfinished
    for number, stage in enumerate(pipeline):
        work.unfinished = unfinished.tagged(f"{work.name}, stage {number}")
        work.unfinished.check()
        stage.block(work)
    block = work.finished()
    chain, chain_hat = work.chain.advanced(work.original), work.chain_hat.advanced(block)
    error = _relative_error(chain, chain_hat)
    if not bool(jnp.isfinite(error)):
        raise FloatingPointError(
            f"{work.name}: its output holds NaN or infinities. What enters it is finite, so that "
            "its weights, or a range that was found for them, are not."
        )
    reporter.emit(
        "block",
        block=work.name,
        output_error=float(error),
        seconds=time.monotonic() - started,
        peak_memory_bytes=peak_memory_bytes(),
    )
    return block, chain, chain_hat


def _relative_error(chain: Chain, chain_hat: Chain) -> jax.Array:
    error, energy = jnp.zeros(()), jnp.zeros(())
    for x, x_hat in zip(chain.xs, chain_hat.xs, strict=True):
        error, energy = _added(error, energy, x, x_hat)
    return error / jnp.maximum(energy, 1e-30)


@jax.jit
def _added(error: jax.Array, energy: jax.Array, x: jax.Array, x_hat: jax.Array) -> Any:
    return error + jnp.sum((x - x_hat) ** 2), energy + jnp.sum(x * x)
