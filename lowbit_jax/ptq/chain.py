"""Activation chains: what enters a block on every calibration batch, and what comes out.

Two chains run through a calibrated model: the float one, which no quantization has touched, and the
quantized one, which saw every block before in its quantized form. Only the inputs of the current
block are held.
"""

import dataclasses
import functools
from collections.abc import Callable, Iterable, Sequence
from itertools import pairwise
from typing import Any, Final

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array

from lowbit_jax.walk import layers, rebuilt


@dataclasses.dataclass(frozen=True)
class Rest:
    """Everything a block is called with but its first argument.

    Attributes:
        arrays: The arrays among it.
        static: The others and the structure; hashable.
    """

    arrays: tuple[Array, ...]
    static: Any

    @classmethod
    def of(cls, args: tuple[Any, ...], kwargs: dict[str, Any]) -> "Rest":
        """Takes arguments apart."""
        leaves, treedef = jax.tree.flatten((args, kwargs))
        is_array = [isinstance(leaf, jax.Array | np.ndarray) for leaf in leaves]
        arrays = tuple(jnp.asarray(x) for x, yes in zip(leaves, is_array, strict=True) if yes)
        others = tuple(None if yes else x for x, yes in zip(leaves, is_array, strict=True))
        return cls(arrays, (treedef, tuple(is_array), others))


def call_block(block: Any, x: Array, arrays: Sequence[Array], static: Any) -> Array:
    """`block(x, *args, **kwargs)` with the arguments put together again."""
    treedef, is_array, others = static
    rest = iter(arrays)
    leaves = [next(rest) if yes else x_ for yes, x_ in zip(is_array, others, strict=True)]
    args, kwargs = jax.tree.unflatten(treedef, leaves)
    y = block(x, *args, **kwargs)
    if not isinstance(y, jax.Array):
        raise NotImplementedError(
            f"a block returned a {type(y).__name__}; block by block quantization needs blocks that "
            "return one array, which enters the next block."
        )
    return y


@functools.partial(jax.jit, static_argnums=(0, 1))
def _apply(graphdef: Any, static: Any, state: Any, x: Array, arrays: Any) -> Array:
    return call_block(nnx.merge(graphdef, state), x, arrays, static)


@dataclasses.dataclass
class Chain:
    """The inputs of one block, batch by batch.

    Attributes:
        xs: First argument of the block in every batch, [batch, ...].
        rests: Its other arguments.
    """

    xs: list[Array]
    rests: list[Rest]

    def outputs(self, block: nnx.Module) -> list[Array]:
        """What a block makes of every batch; compiled once per structure of block."""
        graphdef, state = nnx.split(block)
        # A batch waits for the one before: whatever is in flight holds its temporaries.
        return [
            jax.block_until_ready(_apply(graphdef, rest.static, state, x, rest.arrays))
            for x, rest in zip(self.xs, self.rests, strict=True)
        ]

    def advanced(self, block: nnx.Module) -> "Chain":
        """The chain behind a block."""
        return Chain(self.outputs(block), self.rests)

    @property
    def samples(self) -> int:
        """Samples in all batches."""
        return sum(x.shape[0] for x in self.xs)

    @property
    def nbytes(self) -> int:
        """Bytes of the held activations."""
        return sum(x.nbytes for x in self.xs)


class _Stop(Exception):
    """Raised by a recorder to end a forward pass that has shown what it was run for."""


class _Recorder(nnx.Module):
    """Stands for a block and keeps what it is called with."""

    def __init__(self, block: nnx.Module | None, calls: Callable[..., None]):
        self.block = block
        self.calls = calls

    def __call__(self, x: Array, *args: Any, **kwargs: Any) -> Array:
        if self.block is None:
            self.calls(x, args, kwargs, None)
            raise _Stop
        y = self.block(x, *args, **kwargs)
        self.calls(x, args, kwargs, y)
        return y


def capture(
    model: nnx.Module,
    blocks: Sequence[str],
    batches: Iterable[Any],
    forward: Callable[[nnx.Module, Any], Any],
) -> Chain:
    """Runs the model up to its first block on every batch, and keeps what enters it.

    The first batch is traced through all blocks, to see that they are a chain: each takes what the
    one before returned, and the same further arguments.

    Raises:
        ValueError: There is no batch, a block is never called, blocks are not a chain, or a batch
            gives NaN or infinite inputs.
    """
    chain = Chain([], [])

    def keep(x: Array, args: Any, kwargs: Any, y: Any) -> None:
        chain.xs.append(x)
        chain.rests.append(Rest.of(args, kwargs))

    first = _with_recorders(model, {blocks[0]: _Recorder(None, keep)})
    for number, batch in enumerate(batches):
        if number == 0:
            _check_chain(model, blocks, batch, forward)
        try:
            forward(first, batch)
        except _Stop:
            pass
        else:
            raise ValueError(f"{blocks[0]}: the model's forward pass never called this block.")
        if not bool(jnp.isfinite(chain.xs[-1]).all()):
            raise ValueError(
                f"calibration batch {number}: what enters {blocks[0]} holds NaN or infinities. "
                "Token ids outside the vocabulary do that, and so do damaged weights."
            )
    if not chain.xs:
        raise ValueError("calibration: there was no batch. Pass at least one.")
    return chain


def _with_recorders(model: nnx.Module, recorders: dict[str, nnx.Module]) -> nnx.Module:
    return rebuilt(model, lambda path, module: recorders.get(path, module))


_NOT_A_CHAIN: Final = (
    "Block by block quantization needs blocks that follow each other: give a pattern whose blocks "
    "do, such as the whole layers of a transformer."
)


def _check_chain(
    model: nnx.Module, blocks: Sequence[str], batch: Any, forward: Callable[..., Any]
) -> None:
    """Looks at one pass without running it: arrays that are handed on are the same tracers."""
    calls: list[tuple[str, Array, tuple[Any, ...], Array]] = []
    modules = dict(layers(model))

    def recorder(path: str) -> _Recorder:
        def keep(x: Array, args: Any, kwargs: Any, y: Array) -> None:
            leaves, treedef = jax.tree.flatten((args, kwargs))
            calls.append((path, x, (treedef, *leaves), y))

        return _Recorder(modules[path], keep)

    recorded = _with_recorders(model, {path: recorder(path) for path in blocks})
    graphdef, state = nnx.split(recorded)
    jax.eval_shape(lambda state, batch: forward(nnx.merge(graphdef, state), batch), state, batch)
    order = [path for path, *_ in calls]
    if order != list(blocks):
        missing = sorted(set(blocks) - set(order))
        what = f"never called: {missing}" if missing else f"called in the order {order}"
        raise ValueError(f"the blocks {list(blocks)} were {what}. {_NOT_A_CHAIN}")
    for (before, _, rest, y), (path, x, other, _) in pairwise(calls):
        if x is not y:
            raise ValueError(
                f"{path}: its input is not the output of {before}: something happens in between. "
                f"{_NOT_A_CHAIN}"
            )
        if len(rest) != len(other) or any(
            a is not b and (_is_array(a) or _is_array(b) or a != b)
            for a, b in zip(rest, other, strict=True)
        ):
            raise ValueError(
                f"{path}: is called with other further arguments than {before}. {_NOT_A_CHAIN}"
            )


def _is_array(x: Any) -> bool:
    return isinstance(x, jax.Array | np.ndarray)
