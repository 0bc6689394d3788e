"""Seeing what enters the layers of a block, under jit, without changing what the block computes."""

import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
from flax import nnx
from jaxtyping import Array

from lowbit_jax.ptq.chain import Chain, Rest, call_block
from lowbit_jax.ptq.layers import input_rows
from lowbit_jax.walk import layers, rebuilt

Rows = dict[str, Array]
"""Inputs of layers by path, each [stack.., tokens, K] in float32."""


class _Seen(nnx.Variable):
    """Rows that a tap has seen."""


class _Tap(nnx.Module):
    """A layer that keeps the rows that enter it."""

    def __init__(self, layer: nnx.Module, path: str):
        self.layer = layer
        self.path = path

    def __call__(self, x: Array, *args: Any, **kwargs: Any) -> Any:
        self._keep(x)
        return self.layer(x, *args, **kwargs)  # type: ignore[operator]

    def _keep(self, x: Array) -> None:
        if hasattr(self, "rows"):
            raise NotImplementedError(
                f"{self.path}: is called twice in one pass of its block; its inputs would have to "
                "be weighed against each other."
            )
        self.rows = _Seen(input_rows(self.layer, x))


def tapped(block: nnx.Module, paths: Sequence[str]) -> nnx.Module:
    """A clone of a block with a tap in front of the layers at these paths."""
    chosen = set(paths)
    return rebuilt(block, lambda path, layer: _Tap(layer, path) if path in chosen else layer)


def _rows(block: nnx.Module, x: Array, arrays: Any, static: Any) -> tuple[Rows, Array]:
    y = call_block(block, x, arrays, static)
    taps = [module for _, module in layers(block) if isinstance(module, _Tap)]
    return {tap.path: tap.rows[...] for tap in taps}, y


@functools.partial(jax.jit, static_argnums=(0, 1, 2))
def _step(graphdef: Any, static: Any, f: Any, state: Any, x: Any, arrays: Any, carry: Any) -> Any:
    rows, _ = _rows(nnx.merge(graphdef, state), x, arrays, static)
    return f(rows, carry)


@functools.partial(jax.jit, static_argnums=(0, 1, 2))
def _step_both(
    graphdefs: Any, static: Any, f: Any, states: Any, xs: Any, arrays: Any, carry: Any
) -> Any:
    both = [
        _rows(nnx.merge(graphdef, state), x, arrays, static)[0]
        for graphdef, state, x in zip(graphdefs, states, xs, strict=True)
    ]
    return f(*both, carry)


def fold(
    block: nnx.Module,
    chain: Chain,
    paths: Sequence[str],
    f: Callable[[Rows, Any], Any],
    carry: Any,
) -> Any:
    """Folds the inputs of layers over all batches: `carry = f(rows, carry)`.

    Args:
        block: Whose layers are looked at.
        chain: What enters it.
        paths: Of the layers, inside the block.
        f: Of the rows of one batch; pass the same function every time, a new one is compiled anew.
        carry: What the first call gets.
    """
    graphdef, state = nnx.split(tapped(block, paths))
    for x, rest in zip(chain.xs, chain.rests, strict=True):
        # A batch waits for the one before: whatever is in flight holds its temporaries.
        carry = jax.block_until_ready(_step(graphdef, rest.static, f, state, x, rest.arrays, carry))
    return carry


def fold_both(
    blocks: tuple[nnx.Module, nnx.Module],
    chains: tuple[Chain, Chain],
    paths: Sequence[str],
    f: Callable[[Rows, Rows, Any], Any],
    carry: Any,
) -> Any:
    """`fold` over two blocks and their chains in step: `carry = f(rows, other_rows, carry)`."""
    graphdefs, states = zip(*(nnx.split(tapped(block, paths)) for block in blocks), strict=True)
    for *xs, rest in zip(chains[0].xs, chains[1].xs, chains[0].rests, strict=True):
        moved = _step_both(graphdefs, rest.static, f, states, tuple(xs), rest.arrays, carry)
        carry = jax.block_until_ready(moved)
    return carry


def call_groups(
    block: nnx.Module, x: Array, rest: Rest, paths: Sequence[str]
) -> list[tuple[str, ...]]:
    """The layers in the order they are called, those that share one input together.

    Raises:
        ValueError: A layer is never called.
    """
    groups: list[tuple[int, list[str]]] = []
    inputs: list[Any] = []  # kept alive, so that no two have the same id

    class Recorder(nnx.Module):
        def __init__(self, layer: nnx.Module, path: str):
            self.layer = layer
            self.path = path

        def __call__(self, x: Array, *args: Any, **kwargs: Any) -> Any:
            inputs.append(x)
            if groups and groups[-1][0] == id(x):
                groups[-1][1].append(self.path)
            else:
                groups.append((id(x), [self.path]))
            return self.layer(x, *args, **kwargs)  # type: ignore[operator]

    chosen = set(paths)
    recorded = rebuilt(block, lambda p, layer: Recorder(layer, p) if p in chosen else layer)
    graphdef, state = nnx.split(recorded)

    def run(state: Any, x: Any, arrays: Any) -> Array:
        return call_block(nnx.merge(graphdef, state), x, arrays, rest.static)

    jax.eval_shape(run, state, x, rest.arrays)
    called = {path for _, group in groups for path in group}
    if missing := sorted(chosen - called):
        raise ValueError(
            f"{missing[0]}: this layer never saw an input: its block does not call it. Leave it "
            "float with a rule whose scheme is None."
        )
    return [tuple(group) for _, group in groups]
