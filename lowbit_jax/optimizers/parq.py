"""PARQ: quantization by a regularizer, as an optimizer; the model stays a plain one.

Method (arXiv:2503.15748). The loss is regularized by PAR, a convex piecewise-affine function psi
whose kinks are the levels, and trained by AProx, a proximal method that sums up its steps:

    u' = u - step of the optimizer from the gradient at w        (latent weights)
    w' = prox(u')                                                (what the model computes with)

The paper's practical form of the map has slope 1 / rho in the middle between two levels and is flat
at the levels: with c the middle of the levels q_k <= u <= q_(k+1) around u,

    w = clip(c + (u - c) / rho, q_k, q_(k+1)),  and the outermost level beyond it.

That is the proximal map of (1 / rho - 1) psi at u / rho for the psi that interpolates w**2 / 2 at
the levels: its slope between two of them is c. With rho = 1 the map is the identity and training is
ordinary; rho falls to 0, where the map rounds to the nearest level and the method is the
straight-through estimator.

Deviations: the levels are those of any quantizer whose range is a function of the weights, of the
latent ones in each step (the paper searches them by least squares: for one bit that is the mean
magnitude, as in `w1a16_pc`); beyond the outermost level the map is the identity as long as rho is
1, so that training before the annealing is the float model's own.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from jaxtyping import Array, Float, Int32

from lowbit_jax.blocks import BlockView, divided
from lowbit_jax.formats import Format
from lowbit_jax.grid import effective_scale, from_levels
from lowbit_jax.optimizers.kernels import Kernel, check_found, kernels_of, path_name
from lowbit_jax.quantizers import Quantizer
from lowbit_jax.recipe import Recipe


class ParqState(NamedTuple):
    """The state of `parq`.

    step: Updates so far.
    latent: The latent weights u of quantized leaves; elsewhere `optax.MaskedNode`.
    inner: The state of the optimizer that moves them.
    """

    step: Int32[Array, ""]
    latent: Any
    inner: Any


def inverse_slope(start: int, end: int, steepness: float = 10.0) -> optax.Schedule:
    """rho by the number of updates: 1 before `start`, 0 from `end` on, between them a sigmoid.

    With f in [0, 1] the share of the way, rho = (s(f) - s(1)) / (s(0) - s(1)) for
    s(f) = 1 / (1 + exp(steepness (f - 1/2))).

    Args:
        start: Update at which the annealing begins, from 0.
        end: The first update of hard quantization.
        steepness: Positive; near 0 the fall is linear.

    Raises:
        ValueError: An empty interval, or a steepness that is not positive.
    """
    if not 0 <= start < end:
        raise ValueError(f"inverse_slope: start={start}, end={end}: needs 0 <= start < end.")
    if not steepness > 0:
        raise ValueError(f"inverse_slope: steepness={steepness} must be positive.")
    first, last = 1 / (1 + np.exp(-steepness / 2)), 1 / (1 + np.exp(steepness / 2))

    def rho(count: Any) -> Array:
        share = jnp.clip((jnp.asarray(count, jnp.float32) - start) / (end - start), 0.0, 1.0)
        value = (jax.nn.sigmoid(-steepness * (share - 0.5)) - last) / (first - last)
        # The ends exactly: the map is the identity at 1 and hard at 0.
        return jnp.where(share <= 0, 1.0, jnp.where(share >= 1, 0.0, jnp.clip(value, 0.0, 1.0)))

    return rho


def proximal_map(
    u: Float[Array, "..."], quantizer: Quantizer, rho: Float[Array, ""] | float
) -> Float[Array, "..."]:
    """PARQ's map of latent weights, as at the top.

    Args:
        u: As the quantizer's granularity sees it, [..., K, N].
        quantizer: Without a state; its range is that of `u`.
        rho: Inverse slope in [0, 1]: 1 the identity, 0 exactly `freeze(u).dequantize()`.
    """
    spec = quantizer.spec
    range_ = quantizer.range(u.astype(jnp.float32), {})
    view = BlockView.of(u.shape, spec)
    scale = view.split_scale(effective_scale(range_))
    # A scale of zero (e4m3 underflow) stands for a block of zeros, whatever is divided by it.
    v = divided(view.split(u.astype(jnp.float32)), jnp.where(scale == 0, 1.0, scale))
    if range_.zero_point is not None:
        v = v + view.split_scale(range_.zero_point)
    low, high = _neighbours(v, spec.format)
    middle = (low + high) * np.float32(0.5)
    slope = 1 / jnp.maximum(jnp.asarray(rho, jnp.float32), np.float32(2.0**-24))
    moved = jnp.clip(middle + (v - middle) * slope, low, high)
    soft = from_levels(moved, range_, view, u.dtype)
    hard = quantizer.freeze(u, {}).dequantize()
    rho = jnp.full((1,) * u.ndim, rho, jnp.float32)
    return jnp.where(rho >= 1, u, jnp.where(rho <= 0, hard, soft))


def _neighbours(v: Array, fmt: Format) -> tuple[Array, Array]:
    """The levels around each value; beyond the outermost level that level, twice."""
    with jax.ensure_compile_time_eval():  # a constant of the format, whatever traces this
        codes = jnp.arange(2**fmt.bits, dtype=jnp.uint8)
        table = np.unique(np.asarray(fmt.round(fmt.decode(codes))))
    inside = jnp.clip(v, table[0], table[-1])
    index = jnp.clip(jnp.searchsorted(table, inside, side="right") - 1, 0, table.size - 2)
    low, high = jnp.take(table, index), jnp.take(table, index + 1)
    return jnp.where(v >= table[-1], high, low), jnp.where(v <= table[0], low, high)


def parq(
    inner: optax.GradientTransformation,
    model: nnx.Module,
    recipe: Recipe | str,
    *,
    rho: optax.Schedule,
) -> optax.GradientTransformationExtraArgs:
    """Trains the kernels that a recipe names onto its levels; no layer is replaced.

    `inner` moves the latent weights (weight decay acts on them too), from gradients at the weights
    that the model computes with. Once `rho` is 0 the parameters are on their levels, up to the one
    rounding of adding an update to a weight that just changed its level; the latent weights hold
    the truth: `lb.pack_model(lb.quantize_model(m, recipe))` of a model m with
    `latent_params(params, state)` holds exactly the rounded ones.

    Args:
        inner: Any optimizer.
        model: The float model whose parameters are trained, as `nnx.state(model, nnx.Param)`.
        recipe: As of `quantize_model`: weights only, by quantizers without a state.
        rho: Inverse slope by the number of updates; see `inverse_slope`.

    Raises:
        ValueError, NotImplementedError: A recipe that does not fit; see `kernels_of`. When
            started: parameters that are not the model's.
    """
    kernels = kernels_of(model, recipe, "parq")
    inner = optax.with_extra_args_support(inner)

    def init(params: Any) -> ParqState:
        check_found(params, kernels, "parq")

        def latent(path: Any, leaf: Array) -> Any:
            # A copy: a training step may donate parameters and state, each buffer once.
            return jnp.array(leaf) if path_name(path) in kernels else optax.MaskedNode()

        latents = jax.tree_util.tree_map_with_path(latent, params)
        return ParqState(jnp.zeros([], jnp.int32), latents, inner.init(params))

    def update(grads: Any, state: ParqState, params: Any = None, **extra: Any) -> Any:
        if params is None:
            raise ValueError("parq: update needs the parameters: update(grads, state, params).")
        latent = _filled(params, state.latent)
        steps, inner_state = inner.update(grads, state.inner, latent, **extra)
        latent = optax.apply_updates(latent, steps)
        inverse = rho(state.step)

        def difference(path: Any, u: Array, w: Array, step: Array) -> Array:
            kernel = kernels.get(path_name(path))
            return step if kernel is None else _projected(u, kernel, inverse) - w

        updates = jax.tree_util.tree_map_with_path(difference, latent, params, steps)
        kept = jax.tree.map(
            lambda u, old: old if isinstance(old, optax.MaskedNode) else u, latent, state.latent
        )
        return updates, ParqState(optax.safe_increment(state.step), kept, inner_state)

    return optax.GradientTransformationExtraArgs(init, update)


def latent_params(params: Any, state: ParqState) -> Any:
    """The parameters with the latent weights in place of those that the map made of them."""
    return _filled(params, state.latent)


def _filled(params: Any, latent: Any) -> Any:
    return jax.tree.map(lambda p, u: p if isinstance(u, optax.MaskedNode) else u, params, latent)


def _projected(u: Array, kernel: Kernel, rho: Array) -> Array:
    matrix = kernel.view.to_matrix(u)
    return kernel.view.from_matrix(proximal_map(matrix, kernel.quantizer, rho))
