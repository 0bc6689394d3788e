"""Reconstruction of blocks, and of single layers."""

import dataclasses
import math
from collections.abc import Sequence
from typing import Literal, override

import jax.numpy as jnp
from jaxtyping import Array

from lowbit_jax.ptq.chain import Chain
from lowbit_jax.ptq.ranges import RangeName, check_range, find_range
from lowbit_jax.ptq.reconstruction.dropping import with_dropping
from lowbit_jax.ptq.reconstruction.engine import Fit, fit
from lowbit_jax.ptq.reconstruction.modules import ModuleVariable
from lowbit_jax.ptq.reconstruction.objectives import OutputError
from lowbit_jax.ptq.reconstruction.optimizer import ADAM, Optimizer
from lowbit_jax.ptq.reconstruction.variables import Start, Variable
from lowbit_jax.ptq.stage import BlockWork, Stage


@dataclasses.dataclass(frozen=True)
class Reconstruction(Stage):
    """Learns variables of the kernels so that a block's output is that of the float model.

    The block is run on what the quantized model makes, and held against what the float model makes
    of its own inputs, so that the errors of the blocks before are made good as far as this block
    can. Behind another solver it starts from its ranges, and from the weights that it left.

    Attributes:
        variables: What is learned of each kernel.
        module_variables: What is learned of the block's other parts.
        objective: "output": squared error of the output; "fisher": weighted by the task's squared
            gradients (BRECQ).
        optimizer: How variables are stepped.
        steps: How many steps.
        batch: Samples (sequences, images) a step.
        range: Where ranges start, if no solver came before; see `ranges.find_range`.
        dropped: QDrop's share of activations that stay float while variables are learned.
    """

    variables: tuple[Variable, ...]
    module_variables: tuple[ModuleVariable, ...] = ()
    objective: Literal["output", "fisher"] = "output"
    optimizer: Optimizer = ADAM
    steps: int = 1000
    batch: int = 8
    range: RangeName = "mse"
    dropped: float = 0.0

    def __post_init__(self):
        check_range("Reconstruction", self.range)
        if self.objective not in ("output", "fisher"):
            raise ValueError(
                f"Reconstruction: objective={self.objective!r} is not of output, fisher."
            )
        for name in ("steps", "batch"):
            if getattr(self, name) < 1:
                raise ValueError(f"Reconstruction: {name}={getattr(self, name)} is below 1.")
        if self.dropped and self.module_variables:
            raise NotImplementedError("Reconstruction: dropped goes with kernel variables only.")
        if not 0 <= self.dropped < 1:
            raise ValueError(f"Reconstruction: dropped={self.dropped} is not in [0, 1).")

    @override
    def flops(self, shapes: Sequence[tuple[int, ...]], tokens: int, samples: int) -> float:
        # Forward and backward of the tokens that its steps draw.
        drawn = self.steps * self.batch * tokens / samples
        products = sum(math.prod(shape) for shape in shapes)
        return super().flops(shapes, tokens, samples) + 6.0 * drawn * products

    @override
    def block(self, work: BlockWork) -> None:
        work.groups()  # raises for a layer that is never called, of which nothing could be learned
        starts = {path: self._start(work, path) for path in work.weight_paths}
        rest = work.chain_hat.rests[0]
        outputs = work.chain.outputs(work.original)
        samples: dict[str, Array] = {
            "x": _joined(work.chain_hat, work.chain_hat.xs),
            "y": _joined(work.chain, outputs),
        }
        if self.dropped:
            samples["x_float"] = _joined(work.chain, work.chain.xs)
        if self.objective == "fisher":
            samples["fisher"] = _joined(work.chain, work.fisher(outputs))
        settings = Fit(
            loss=OutputError(rest.static, self.dropped),
            variables=self.variables,
            module_variables=self.module_variables,
            optimizer=self.optimizer,
            specs=tuple((path, work.spec(path)) for path in starts),
            steps=self.steps,
            batch=self.batch,
        )
        module = with_dropping(work.working, self.dropped) if self.dropped else work.working
        fitted = fit(settings, module, starts, samples, rest.arrays, work)
        for path, solution in fitted.solutions.items():
            work.settle(path, solution)
            work.note(path, solution.info)

    def _start(self, work: BlockWork, path: str) -> Start:
        before = work.solutions.get(path)
        if before is not None:
            return Start(before.weight if before.latent is None else before.latent, before.range)
        weight = work.matrix(path).astype(jnp.float32)
        quantizer = work.schemes[path].weight
        assert quantizer is not None
        return Start(weight, find_range(weight, quantizer.spec, self.range, quantizer=quantizer))


def _joined(chain: Chain, xs: Sequence[Array]) -> Array:
    """All batches along the first axis.

    Raises:
        NotImplementedError: Further arguments that differ between batches.
    """
    first = chain.rests[0]
    for rest in chain.rests[1:]:
        if rest.static != first.static or any(
            a.shape != b.shape or not bool((a == b).all())
            for a, b in zip(rest.arrays, first.arrays, strict=True)
        ):
            raise NotImplementedError(
                "reconstruction draws samples from all batches, and here each batch calls the "
                "block with other further arguments. Make them equal, such as one mask for all."
            )
    return jnp.concatenate(list(xs))
