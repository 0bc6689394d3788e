"""The last stage of a pipeline: the whole quantized model against the float model's predictions."""

import dataclasses
from typing import Any, Final, override

import jax
import jax.numpy as jnp
from flax import nnx

from lowbit_jax.nn import TrainTwin
from lowbit_jax.ptq.layers import get_matrix
from lowbit_jax.ptq.reconstruction.engine import Fit, fit
from lowbit_jax.ptq.reconstruction.modules import ModuleVariable, Norms
from lowbit_jax.ptq.reconstruction.objectives import Divergence
from lowbit_jax.ptq.reconstruction.optimizer import Optimizer
from lowbit_jax.ptq.reconstruction.scales import Scales
from lowbit_jax.ptq.reconstruction.variables import Start, Variable
from lowbit_jax.ptq.reconstruction.written import Written
from lowbit_jax.ptq.stage import ModelWork, Stage, solved_twin, unquantized_kernel
from lowbit_jax.quantizers import FixedRange
from lowbit_jax.surgery import quantized_layers
from lowbit_jax.walk import rebuilt

_COSINE: Final = Optimizer(decay="cosine")
_NONE: Final = Written()


@dataclasses.dataclass(frozen=True)
class EndToEnd(Stage):
    """Trains variables of all kernels at once on KL(float model || quantized model).

    With `Scales` and `Norms` it is EfficientQAT's second phase (arXiv:2407.11062, section 3.3)
    against a teacher's logits instead of the next token: no code changes. With variables that
    round, codes move too.

    Attributes:
        variables: What is learned of each kernel.
        module_variables: What is learned of the model's other parts.
        optimizer: How they are stepped.
        steps: How many steps.
        batch: Samples a step.
        written: Samples beside the run's batches that the float model writes itself.
    """

    variables: tuple[Variable, ...] = (Scales(1e-3),)
    module_variables: tuple[ModuleVariable, ...] = (Norms(1e-4),)
    optimizer: Optimizer = _COSINE
    steps: int = 200
    batch: int = 8
    written: Written = _NONE

    @override
    def finish(self, work: ModelWork) -> nnx.Module:
        twins = {
            path: twin
            for path, twin in quantized_layers(work.model)
            if isinstance(twin, TrainTwin) and twin.scheme.weight is not None
        }
        starts, specs = {}, []
        for path, twin in twins.items():
            quantizer = twin.scheme.weight
            assert isinstance(quantizer, FixedRange)
            matrix = get_matrix(twin)
            starts[path] = Start(matrix, quantizer.range(matrix, twin.state("kernel")))
            specs.append((path, quantizer.spec))
        trained = rebuilt(work.model, lambda path, m: unquantized_kernel(m) if path in twins else m)
        graphdef, state = nnx.split(work.reference)
        settings = Fit(
            loss=Divergence(work.forward, graphdef),
            variables=self.variables,
            module_variables=self.module_variables,
            optimizer=self.optimizer,
            specs=tuple(specs),
            steps=self.steps,
            batch=self.batch,
        )
        samples = jax.tree.map(lambda *xs: jnp.concatenate(xs), *self.written.samples(work))

        def progress(done: int, loss: float) -> None:
            work.emit("progress", stage="EndToEnd", step=done, steps=self.steps, kl=loss)

        fitted = fit(settings, trained, starts, samples, state, work, progress)

        def replace(path: str, layer: Any) -> Any:
            if path not in fitted.solutions:
                return layer
            return solved_twin(layer, twins[path].scheme, fitted.solutions[path])

        return rebuilt(fitted.module, replace)
