"""Weights frozen onto their grid a share at a time; those that are left make up for it.

Incremental network quantization (INQ, arXiv:1702.03044): from time to time the largest weights that
are still free are put on the nearest level and never move again (sections 2.2 and 2.3, its
"pruning-inspired" partition); the others are trained on, Eq. 8:

    w' = w + update * T,        T = 0 where w is frozen, else 1.

The levels are those of the weights that training starts from, and stay. With a share that rises at
every update the same transformation is a progressive freezing, and with one that is 1 from the
beginning it is plain rounding.

Deviation: levels are those of any quantizer whose range is a function of the weights; the paper's
are powers of two (`w4a16_pow2`), which end at a power of two, not at the largest weight.
"""

from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from flax import nnx
from jaxtyping import Array, Bool, Float, Int32

from lowbit_jax.grid import snap
from lowbit_jax.optimizers.kernels import Kernel, check_found, kernels_of, path_name
from lowbit_jax.quantizers import State, range_state, state_range
from lowbit_jax.recipe import Recipe


class IncrementalState(NamedTuple):
    """The state of `incremental`.

    step: Updates so far.
    share: Of each kernel's weights, how many are frozen, in [0, 1].
    frozen: Which of a kernel's weights are; elsewhere `optax.MaskedNode`.
    ranges: Each kernel's range, by its parts; elsewhere `optax.MaskedNode`.
    inner: The state of the optimizer that moves the others.
    """

    step: Int32[Array, ""]
    share: Float[Array, ""]
    frozen: Any
    ranges: Any
    inner: Any


def partitions(shares: Mapping[int, float]) -> optax.Schedule:
    """The share of frozen weights by the number of updates: `{0: 0.5, 1000: 0.75, 2000: 1.0}`.

    Raises:
        ValueError: A share outside (0, 1], or one that does not rise.
    """
    steps = sorted(shares)
    values = [shares[step] for step in steps]
    rises = all(a < b for a, b in zip([0.0, *values], values, strict=False))
    if not steps or not rises or values[-1] > 1:
        raise ValueError(
            f"partitions({dict(shares)}): shares rise with the number of updates, within (0, 1]."
        )

    def share(count: Any) -> Array:
        reached = jnp.searchsorted(jnp.asarray(steps), jnp.asarray(count), side="right")
        return jnp.take(jnp.asarray([0.0, *values], jnp.float32), reached)

    return share


def incremental(
    inner: optax.GradientTransformation,
    model: nnx.Module,
    recipe: Recipe | str,
    *,
    share: optax.Schedule,
) -> optax.GradientTransformationExtraArgs:
    """Trains the kernels that a recipe names while more and more of their weights are frozen.

    At the end, with a share of 1, all of them are on levels. `lb.quantize_model(model, recipe)`
    finds the same levels again where the format's largest one is the largest magnitude of its block
    (codebooks: pow2, apot, nf4); for others give `FixedRange` layers the ranges of the state.

    Args:
        inner: Any optimizer; it sees no gradient of frozen weights.
        model: The float model whose parameters are trained, as `nnx.state(model, nnx.Param)`.
        recipe: As of `quantize_model`: weights only, by quantizers without a state.
        share: Of each kernel's weights that is to be frozen, by the number of updates; it never
            falls. See `partitions`.

    Raises:
        ValueError, NotImplementedError: As of `parq`.
    """
    kernels = kernels_of(model, recipe, "incremental")
    inner = optax.with_extra_args_support(inner)

    def init(params: Any) -> IncrementalState:
        check_found(params, kernels, "incremental")

        def each(make: Any) -> Any:
            def leaf_or_none(path: Any, leaf: Array) -> Any:
                kernel = kernels.get(path_name(path))
                return optax.MaskedNode() if kernel is None else make(kernel, leaf)

            return jax.tree_util.tree_map_with_path(leaf_or_none, params)

        return IncrementalState(
            jnp.zeros([], jnp.int32),
            jnp.zeros([], jnp.float32),
            each(lambda kernel, leaf: jnp.zeros(leaf.shape, bool)),
            each(_range),
            inner.init(params),
        )

    def update(grads: Any, state: IncrementalState, params: Any = None, **extra: Any) -> Any:
        if params is None:
            raise ValueError("incremental: update needs the parameters.")
        target = jnp.maximum(jnp.asarray(share(state.step), jnp.float32), state.share)

        def freeze(w: Array, frozen: Any) -> Any:
            if isinstance(frozen, optax.MaskedNode):
                return frozen
            # Sorting takes longer than most updates, and most of them freeze nothing.
            return jax.lax.cond(
                target > state.share, lambda: _largest(w, frozen, target), lambda: frozen
            )

        frozen = jax.tree.map(freeze, params, state.frozen)
        steps, inner_state = inner.update(_masked(grads, frozen), state.inner, params, **extra)

        def final(path: Any, w: Array, step: Array, frozen: Any, range_: Any) -> Array:
            kernel = kernels.get(path_name(path))
            return step if kernel is None else jnp.where(frozen, _on_grid(w, kernel, range_), step)

        updates = jax.tree_util.tree_map_with_path(final, params, steps, frozen, state.ranges)
        step = optax.safe_increment(state.step)
        return updates, IncrementalState(step, target, frozen, state.ranges, inner_state)

    return optax.GradientTransformationExtraArgs(init, update)


def _range(kernel: Kernel, leaf: Array) -> State:
    matrix = kernel.view.to_matrix(leaf).astype(jnp.float32)
    return range_state(kernel.quantizer.range(matrix, {}))


def _largest(w: Array, frozen: Bool[Array, "..."], share: Array) -> Bool[Array, "..."]:
    """The frozen weights and the largest others, `share` of all in number."""
    magnitude = jnp.where(frozen, jnp.inf, jnp.abs(w.astype(jnp.float32))).reshape(-1)
    order = jnp.argsort(magnitude, descending=True)
    rank = jnp.zeros(order.shape, jnp.int32).at[order].set(jnp.arange(order.size))
    return (rank < jnp.round(share * order.size).astype(jnp.int32)).reshape(w.shape)


def _masked(grads: Any, frozen: Any) -> Any:
    def one(g: Array, frozen: Any) -> Array:
        return g if isinstance(frozen, optax.MaskedNode) else jnp.where(frozen, 0, g)

    return jax.tree.map(one, grads, frozen)


def _on_grid(w: Array, kernel: Kernel, state: State) -> Array:
    """The update that puts every weight on its nearest level."""
    matrix = kernel.view.to_matrix(w)
    return kernel.view.from_matrix(snap(matrix, kernel.quantizer.spec, state_range(state))) - w
