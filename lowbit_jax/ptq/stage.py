"""What a pipeline is made of: stages, and what they work on.

A stage may act at three moments: on the whole float model before the first block (`prepare`), on
each block in turn (`block`), and on the whole quantized model after the last one (`finish`).
Transforms rewrite the float model without changing its function; one solver chooses the codes;
others refine what it chose.
"""

import dataclasses
import math
from collections.abc import Callable, Sequence
from typing import Any, ClassVar

from flax import nnx
from jaxtyping import Array, Float

from lowbit_jax.grid import Range
from lowbit_jax.models.wiring import Wiring
from lowbit_jax.nn import TRAIN_TWINS, QuantStat, TrainTwin, to_float
from lowbit_jax.ptq.chain import Chain, call_block
from lowbit_jax.ptq.layers import float_class, get_matrix, set_matrix
from lowbit_jax.ptq.taps import call_groups
from lowbit_jax.ptq.unfinished import Unfinished
from lowbit_jax.quantizers import FixedRange, Quantizer, range_state
from lowbit_jax.scheme import LayerScheme
from lowbit_jax.spec import QuantSpec
from lowbit_jax.surgery import calibrate_model
from lowbit_jax.walk import layers, rebuilt


@dataclasses.dataclass(frozen=True)
class LayerSolution:
    """What was chosen for one layer.

    Attributes:
        weight: The matrix on its grid, float32 [stack.., K, N].
        range: Its scales and zero points.
        info: Figures for the report, such as the damping.
        latent: Weights behind it, which round to `weight`: where training goes on from. Default:
            `weight` itself.
    """

    weight: Float[Array, "*stack k n"]
    range: Range
    info: dict[str, Any] = dataclasses.field(default_factory=dict)
    latent: Float[Array, "*stack k n"] | None = None


@dataclasses.dataclass
class BlockWork:
    """One block while a pipeline works on it.

    Attributes:
        name: Its path in the model.
        original: The float block; transforms replace it by one of the same function.
        schemes: How each of its layers is to be quantized, by the layer's path in the block.
        chain: What enters it in the float model.
        chain_hat: What enters it in the quantized model.
        key: For whatever is random.
        wiring: Which norm feeds which layers; None if the model does not say.
        note: Reports a figure or a message about a layer (path, {name: value}).
        fisher: Makes the squared gradients of the task's loss at the block's output in the float
            model, batch by batch, from that output.
        unfinished: Where a long fit is kept, so that a stopped run goes on in its middle.
    """

    name: str
    original: nnx.Module
    schemes: dict[str, LayerScheme]
    chain: Chain
    chain_hat: Chain
    key: Array
    wiring: Wiring | None
    note: Callable[[str, dict[str, Any]], None]
    fisher: Callable[[Sequence[Array]], list[Array]]
    unfinished: Unfinished = dataclasses.field(default_factory=Unfinished)

    def __post_init__(self):
        self.solutions: dict[str, LayerSolution] = {}
        self._working: nnx.Module | None = None

    @property
    def working(self) -> nnx.Module:
        """The block that is being solved: quantized activations, solved kernels on their grids.

        It is made from `original` when it is first asked for; from then on no transform may come.
        """
        if self._working is None:
            self._working = _with_activations(self)
        return self._working

    def transform(self, block: nnx.Module) -> None:
        """Replaces the float block by another one of the same function.

        Raises:
            ValueError: A solver has begun.
        """
        if self._working is not None:
            raise ValueError(
                "pipeline: a transform stands behind a solver, whose codes it would change. Put "
                "transforms first."
            )
        self.original = block

    def spec(self, path: str) -> QuantSpec:
        """The spec of a layer's kernel."""
        weight = self.schemes[path].weight
        assert weight is not None
        return weight.spec

    @property
    def weight_paths(self) -> list[str]:
        """The layers whose kernels are quantized, in the order of the block's modules."""
        return [path for path, scheme in self.schemes.items() if scheme.weight is not None]

    def groups(self) -> list[tuple[str, ...]]:
        """The layers to solve in the order they are called, those of one input together."""
        x, rest = self.chain.xs[0], self.chain.rests[0]
        return call_groups(self.original, x, rest, self.weight_paths)

    def layer(self, path: str, block: nnx.Module | None = None) -> nnx.Module:
        """A layer of `original`, or of another form of the block."""
        return dict(layers(self.original if block is None else block))[path]

    def matrix(self, path: str) -> Float[Array, "*stack k n"]:
        """The float kernel of a layer, as a matrix."""
        return get_matrix(self.layer(path))

    def settle(self, path: str, solution: LayerSolution) -> None:
        """Takes a layer's solution; a later one for the same layer replaces it."""
        self.solutions[path] = solution
        set_matrix(self.layer(path, self.working), solution.weight)

    def finished(self) -> nnx.Module:
        """The quantized block, its twins with the ranges that were found.

        Raises:
            ValueError: A layer has no solution.
        """
        if missing := [path for path in self.weight_paths if path not in self.solutions]:
            raise ValueError(
                f"{self.name}/{missing[0]}: no stage of the pipeline solved it. End the pipeline "
                "with a solver, such as RoundToNearest()."
            )

        def replace(path: str, layer: Any) -> Any:
            if path not in self.schemes:
                return layer
            return solved_twin(layer, self.schemes[path], self.solutions.get(path))

        return rebuilt(self.working, replace)


def _with_activations(work: BlockWork) -> nnx.Module:
    """The float block with quantizers of activations, calibrated where they are static."""

    def replace(path: str, layer: Any) -> Any:
        scheme = work.schemes.get(path)
        if scheme is None or (scheme.input is None and scheme.output is None):
            return layer
        activations = LayerScheme(input=scheme.input, output=scheme.output)
        return _twin(layer, activations)

    block = rebuilt(work.original, replace)
    chain = work.chain_hat
    batches = [(x, rest.arrays) for x, rest in zip(chain.xs, chain.rests, strict=True)]
    # A block without statistics comes back as it is, without a pass.
    return calibrate_model(block, batches, forward=_Forward(chain.rests[0].static))


@dataclasses.dataclass(frozen=True)
class _Forward:
    """Runs a block on (x, arrays); equal for equal static arguments, so that it compiles once."""

    static: Any

    def __call__(self, block: nnx.Module, batch: Any) -> Any:
        x, arrays = batch
        return call_block(block, x, arrays, self.static)


def _twin(layer: nnx.Module, scheme: LayerScheme) -> TrainTwin:
    return TRAIN_TWINS[float_class(layer)](layer, scheme)


def untrained_twin(layer: nnx.Module, scheme: LayerScheme) -> TrainTwin:
    """The twin of a solved layer, its range not yet set."""
    if scheme.weight is None:
        return _twin(layer, scheme)
    return _twin(layer, dataclasses.replace(scheme, weight=FixedRange(scheme.weight.spec)))


def solved_twin(layer: Any, scheme: LayerScheme, solution: LayerSolution | None) -> nnx.Module:
    """A twin whose kernel quantizer has the solution's range; statistics are taken over."""
    if solution is None:
        return layer  # activations only: its twin is there already
    twin = untrained_twin(layer, scheme)
    for name, value in vars(layer).items():
        if isinstance(value, QuantStat):
            setattr(twin, name, value)
    set_matrix(twin, solution.weight if solution.latent is None else solution.latent)
    for name, value in range_state(solution.range).items():
        getattr(twin, f"kernel_{name}")[...] = value
    return twin


def unquantized_kernel(twin: TrainTwin) -> nnx.Module:
    """A twin with its kernel left float: with its quantizers of activations, or the plain layer."""
    scheme = twin.scheme
    if scheme.input is not None or scheme.output is not None:
        plain = _twin(twin, LayerScheme(input=scheme.input, output=scheme.output))
        for name, value in vars(twin).items():
            if isinstance(value, QuantStat) and not name.startswith("kernel_"):
                setattr(plain, name, value)
        for name in [n for n, v in vars(plain).items() if isinstance(v, nnx.Variable)]:
            if name.startswith("kernel_"):
                delattr(plain, name)
        return plain
    layer = to_float(twin)
    set_matrix(layer, get_matrix(twin))
    return layer


@dataclasses.dataclass
class ModelWork:
    """The whole model, before the first block or after the last.

    Attributes:
        model: The model to change: float in `prepare`, quantized in `finish`.
        reference: The float model, as the user gave it.
        recipe: Which layers are, or will be, quantized how, by path.
        batches: The calibration batches.
        forward: Runs a model on a batch.
        key: For whatever is random.
        wiring: Which norm feeds which layers; None if the model does not say.
        note: Reports figures of a layer (path, {name: value}).
        emit: Reports an event of another kind, such as progress: emit(kind, **fields).
        unfinished: Where a long fit is kept, so that a stopped run goes on in its middle.
    """

    model: nnx.Module
    reference: nnx.Module
    schemes: dict[str, LayerScheme]
    batches: Sequence[Any]
    forward: Callable[[nnx.Module, Any], Any]
    key: Array
    wiring: Wiring | None
    note: Callable[[str, dict[str, Any]], None]
    emit: Callable[..., None]
    unfinished: Unfinished = dataclasses.field(default_factory=Unfinished)


class Stage:
    """One stage of a pipeline; finals are frozen dataclasses and do something in some hook."""

    transforms: ClassVar[bool] = False
    """Whether it rewrites the float model, and so has to stand in front of every solver."""

    def flops(self, shapes: Sequence[tuple[int, ...]], tokens: int, samples: int) -> float:
        """Floating-point operations on one block, roughly; default: one pass of both chains.

        Args:
            shapes: Of its layers' kernels as matrices [stack.., K, N].
            tokens: Tokens of the calibration data.
            samples: Sequences or images of it.
        """
        return 4.0 * tokens * sum(math.prod(shape) for shape in shapes)

    def prepare(self, work: ModelWork) -> nnx.Module:
        """The float model to go on with; `work.model` itself is not changed."""
        return work.model

    def block(self, work: BlockWork) -> None:
        """Works on one block."""

    def finish(self, work: ModelWork) -> nnx.Module:
        """The quantized model to go on with; `work.model` itself is not changed."""
        return work.model


@dataclasses.dataclass(frozen=True)
class LayerProblem:
    """One layer to solve, as a matrix.

    Attributes:
        path: Of the layer, inside its block.
        weight: The float kernel, float32 [stack.., K, N].
        spec: How it is quantized.
        quantizer: The scheme's own quantizer, whose range is the default.
        hessian: Mean of x x^T over the tokens that enter the layer in the quantized model, float32
            [stack.., K, K]; None for data-free solvers.
        drift: Mean of (x_float - x) x^T, of the same shape; None without error propagation.
        tokens: Tokens seen [stack..]; None for data-free solvers.
    """

    path: str
    weight: Float[Array, "*stack k n"]
    spec: QuantSpec
    quantizer: Quantizer
    hessian: Float[Array, "*stack k k"] | None = None
    drift: Float[Array, "*stack k k"] | None = None
    tokens: Array | None = None
