"""What quantization does to a block's output under candidate scales of one link.

For every candidate the link's targets are rounded to nearest in the range of their extremes, and
the mean squared error is taken of what the smallest module that holds all of them makes of its
inputs: the attention for query, key and value, the MLP for gate and up, the layer itself where
there is one target. That is the objective of AWQ's program (its paper writes one layer's output).
Only that module is run again for every candidate.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from lowbit_jax.grid import snap
from lowbit_jax.models.wiring import Link
from lowbit_jax.nn import TRAIN_TWINS
from lowbit_jax.ptq.chain import call_block
from lowbit_jax.ptq.layers import get_matrix, set_matrix
from lowbit_jax.ptq.ranges import find_range
from lowbit_jax.ptq.stage import BlockWork
from lowbit_jax.ptq.transforms.folding import rows_of, to_target
from lowbit_jax.quantizers import Absmax, StaticAbsmax
from lowbit_jax.scheme import LayerScheme
from lowbit_jax.walk import layers, rebuilt


class Candidates(NamedTuple):
    """Scales to try, and one shift for all of them.

    Attributes:
        scales: [candidates, source features].
        shift: [source features], or None.
    """

    scales: Float[Array, "c n"]
    shift: Float[Array, " n"] | None = None


@dataclasses.dataclass(frozen=True)
class _Setup:
    """What a compiled search depends on beside arrays; equal for blocks of equal structure."""

    graphdef: Any
    static: Any
    link: Link
    schemes: tuple[tuple[str, LayerScheme], ...]
    activations: bool


def output_errors(
    work: BlockWork, link: Link, candidates: Candidates, *, activations: bool
) -> Float[Array, " c"]:
    """Mean squared error of the link's output for every candidate, over all calibration batches.

    Args:
        work: The block, in its present float form, and its inputs in the float model.
        link: One of the block's.
        candidates: Scales and shift.
        activations: Whether the targets' inputs are quantized, too; static ranges are those of each
            sequence here.
    """
    graphdef, state = nnx.split(work.original)
    schemes = tuple((path, work.schemes[path]) for path in link.targets if path in work.schemes)
    total, count = jnp.zeros(candidates.scales.shape[0], jnp.float32), 0
    for x, rest in zip(work.chain.xs, work.chain.rests, strict=True):
        setup = _Setup(graphdef, rest.static, link, schemes, activations)
        total += _batch_errors(setup, state, x, rest.arrays, candidates)
        count += 1
    return total / count


@functools.partial(jax.jit, static_argnums=0)
def _batch_errors(
    setup: _Setup, state: Any, x: Array, arrays: Any, candidates: Candidates
) -> Float[Array, " c"]:
    """Of one batch; candidates one after the other, so that memory holds one of them."""
    where = common_module(setup.link.targets)
    block = nnx.merge(setup.graphdef, state)
    call = _seen_call(block, where, x, arrays, setup.static)
    graphdef, part = nnx.split(dict(layers(block))[where])
    wanted = call.output.astype(jnp.float32)

    def error(scale: Array) -> Array:
        # Copied, so that its variables belong to the map's own trace and can be assigned.
        module = nnx.merge(graphdef, part, copy=True)
        quantized = _rounded(module, where, setup, scale, candidates.shift)
        return jnp.mean((call.again(quantized).astype(jnp.float32) - wanted) ** 2)

    return jax.lax.map(error, candidates.scales)


def _rounded(
    module: nnx.Module, where: str, setup: _Setup, scale: Array, shift: Array | None
) -> nnx.Module:
    """The module with the link's layers rounded to nearest behind this scale and shift."""
    scale = to_target(scale, setup.link)
    shift = None if shift is None else to_target(shift, setup.link)
    schemes = dict(setup.schemes)

    def replace(path: str, layer: Any) -> Any:
        full = "/".join(filter(None, (where, path)))
        if full not in setup.link.targets:
            return layer
        matrix, scheme = get_matrix(layer).astype(jnp.float32), schemes.get(full)
        rows = rows_of(scale, layer)
        kernel, twin = matrix * rows, layer
        if scheme is not None and scheme.weight is not None:
            spec = scheme.weight.spec
            kernel = snap(kernel, spec, find_range(kernel, spec, "minmax"))
        if not setup.activations or scheme is None or scheme.input is None:
            # Dividing rows is dividing inputs; a shift of inputs that stay float changes nothing.
            set_matrix(layer, kernel / rows)
            return layer
        set_matrix(layer, kernel)
        quantizer = scheme.input
        if isinstance(quantizer, StaticAbsmax):
            quantizer = Absmax(quantizer.spec)
        twin = TRAIN_TWINS[type(layer)](layer, LayerScheme(input=quantizer))
        offset = None
        if shift is not None:
            offset = jnp.dot(shift, matrix, precision=jax.lax.Precision.HIGHEST)
        return _Behind(twin, scale, shift, offset)

    return rebuilt(module, replace)


class _Behind(nnx.Module):
    """A layer of scaled rows behind the division of its inputs: layer((x - z) / s) + z W."""

    def __init__(self, layer: nnx.Module, scale: Array, shift: Array | None, offset: Array | None):
        if type(layer).float_class not in (nnx.Linear, nnx.Conv):  # type: ignore[attr-defined]
            raise NotImplementedError(
                f"{type(layer).__name__}: scales of quantized inputs are searched for Linear and "
                "Conv layers only."
            )
        self.layer = layer
        self.arrays = nnx.data((scale, shift, offset))

    def __call__(self, x: Array, *args: Any, **kwargs: Any) -> Array:
        scale, shift, offset = self.arrays
        lead = (1,) * (x.ndim - 1)
        if shift is not None:
            x = x - shift.reshape(*lead, -1)
        y = self.layer(x / scale.reshape(*lead, -1), *args, **kwargs)  # type: ignore[operator]
        return y if offset is None else y + offset.reshape(*lead, -1)


def common_module(paths: tuple[str, ...]) -> str:
    """The path of the smallest module that holds all of these; "" for the block itself."""
    first, *others = (path.split("/") for path in paths)
    shared = 0
    while shared < len(first) and all(path[: shared + 1] == first[: shared + 1] for path in others):
        shared += 1
    return "/".join(first[:shared])


@dataclasses.dataclass(frozen=True)
class _Call:
    """One call of a module."""

    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    output: Array

    def again(self, module: Any) -> Array:
        """What another module makes of the same arguments."""
        return module(*self.args, **self.kwargs)


class _Witness(nnx.Module):
    """Tells of the calls of a module."""

    def __init__(self, module: nnx.Module, tell: Callable[[_Call], None]):
        self.module = module
        self.tell = tell

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        y = self.module(*args, **kwargs)  # type: ignore[operator]
        self.tell(_Call(args, kwargs, y))
        return y


def _seen_call(block: nnx.Module, where: str, x: Array, arrays: Any, static: Any) -> _Call:
    """How a block calls the module at a path, once."""
    calls: list[_Call] = []
    witnessed = rebuilt(block, lambda p, m: _Witness(m, calls.append) if p == where else m)
    call_block(witnessed, x, arrays, static)
    if len(calls) != 1:
        raise NotImplementedError(
            f"{where}: is called {len(calls)} times in a pass of its block; scales are searched "
            "for modules that are called once."
        )
    return calls[0]
