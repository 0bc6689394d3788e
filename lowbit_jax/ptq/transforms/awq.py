"""AWQ: scales that protect what large activations multiply, and a search for clipping.

[AWQScale(), AWQClip()]    the method of the paper and its program
[AWQScale(), GPTQ()]       its scales in front of another solver
"""

import dataclasses
import re
from typing import ClassVar, override

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from lowbit_jax.grid import snap
from lowbit_jax.ptq.ranges import find_range
from lowbit_jax.ptq.solver import LayerSolver
from lowbit_jax.ptq.stage import BlockWork, LayerProblem, LayerSolution, Stage
from lowbit_jax.ptq.transforms.folding import (
    Which,
    check_which,
    fold_scale,
    links_of,
    positive,
    to_source,
)
from lowbit_jax.ptq.transforms.observe import features
from lowbit_jax.ptq.transforms.search import Candidates, output_errors
from lowbit_jax.spec import QuantSpec


@dataclasses.dataclass(frozen=True)
class AWQScale(Stage):
    """AWQ's scales (arXiv:2306.00978): the rows of a link's kernels W are multiplied by

        s = mean|X|^alpha / sqrt(max * min)    (Eq. 5; the quotient is its program's)

    and their inputs X divided, with the alpha in {0, 1/grid, .., (grid - 1)/grid} that makes
    ||f(Q(s W), X / s) - f(W, X)||^2 (Eq. 4) least; f is the smallest module that holds all layers
    of the link and Q rounds to nearest in min-max (symmetric: absmax) ranges of the layer's spec.
    1/s is folded into what makes X. All links of a block are searched on its inputs in the float
    model, then folded together: scales of the outputs of a layer move its per-channel or grouped
    ranges with them, so that the order does not matter.

    Differences: value -> out is scaled under grouped-query attention too (the program skips it,
    since the shapes differ): the repeats of a value share one scale, from their mean magnitude.
    Quantizers of activations are left out of the search.

    Attributes:
        grid: Number of alphas tried.
        links: "all", or "norms" only.
    """

    grid: int = 20
    links: Which = "all"

    transforms: ClassVar[bool] = True

    def __post_init__(self):
        if self.grid < 1:
            raise ValueError(f"AWQScale(grid={self.grid}): at least one alpha is tried.")
        check_which("AWQScale", self.links)

    @override
    def flops(self, shapes, tokens, samples) -> float:
        return self.grid * super().flops(shapes, tokens, samples)

    @override
    def block(self, work: BlockWork) -> None:
        links = links_of(work, "AWQScale", self.links)
        links = [link for link in links if any(_has_weight(work, path) for path in link.targets)]
        if not links:
            return
        seen = features(work, links)
        block = nnx.clone(work.original)
        for link in links:
            scales = awq_scales(to_source(seen[link.source].mean, link, "mean"), self.grid)
            errors = output_errors(work, link, Candidates(scales), activations=False)
            best = int(jnp.argmin(errors))
            fold_scale(block, link, scales[best])
            work.note(
                link.source,
                {
                    "alpha": best / self.grid,
                    "error_before": float(errors[0]),
                    "error_after": float(errors[best]),
                },
            )
        work.transform(block)


def _has_weight(work: BlockWork, path: str) -> bool:
    return path in work.schemes and work.schemes[path].weight is not None


def awq_scales(magnitude: Float[Array, " n"], grid: int) -> Float[Array, "grid n"]:
    """The candidates: magnitude^alpha for alpha = i / grid, normalized; alpha = 0 changes nothing.

    Magnitudes count as at least 1e-4, and a feature that was never excited keeps its scale 1.
    """
    alphas = jnp.arange(grid, dtype=jnp.float32) / grid
    powers = jnp.maximum(magnitude[None, :] ** alphas[:, None], 1e-4)
    excited = magnitude[None, :] > 0
    largest = jnp.max(jnp.where(excited, powers, 0.0), axis=1, keepdims=True)
    smallest = jnp.min(jnp.where(excited, powers, jnp.inf), axis=1, keepdims=True)
    return positive(powers / jnp.sqrt(largest * smallest), jnp.broadcast_to(excited, powers.shape))


@dataclasses.dataclass(frozen=True)
class AWQClip(LayerSolver):
    """AWQ's clipping, then rounding to nearest in the range of the clipped weights.

    Of the shares 1, 1 - 1/grid, .. above 1 - max_shrink, every group of every output takes the one
    that makes E[(x . (Q(clip(w)) - w))^2] least, w clipped to that share of its largest magnitude.

    Differences from the authors' program: the expectation is over all calibration tokens, through
    their second moments inside the group, instead of up to 512 sampled ones; inputs are those of
    the quantized model.

    Attributes:
        grid: Steps that would lead down to 0.
        max_shrink: Largest share that is cut off, in (0, 1).
        skip: Pattern of the layers that are not clipped, by their whole path in the block: what
            enters the product of queries and keys.
    """

    grid: int = 20
    max_shrink: float = 0.5
    skip: str = r"(.*/)?(query|key|q_proj|k_proj)"

    def __post_init__(self):
        if not 0 < self.max_shrink < 1 or self.grid < 1:
            raise ValueError(
                f"AWQClip(grid={self.grid}, max_shrink={self.max_shrink}): needs grid >= 1 and a "
                "share in (0, 1)."
            )
        re.compile(self.skip)

    @override
    def solve(self, problem: LayerProblem, key: jax.Array) -> LayerSolution:
        weight, spec = problem.weight, problem.spec
        if re.fullmatch(self.skip, problem.path):
            range_ = find_range(weight, spec, "minmax")
            return LayerSolution(snap(weight, spec, range_), range_)
        assert problem.hessian is not None
        shares = [1 - i / self.grid for i in range(max(1, int(self.max_shrink * self.grid)))]
        share = best_shares(weight, problem.hessian, spec, jnp.asarray(shares, jnp.float32))
        clipped = _clipped(weight, share)
        range_ = find_range(clipped, spec, "minmax")
        info = {"clipped": float(jnp.mean(jnp.abs(clipped) < jnp.abs(weight)))}
        return LayerSolution(snap(clipped, spec, range_), range_, info)


def best_shares(
    weight: Float[Array, "*stack k n"],
    hessian: Float[Array, "*stack k k"],
    spec: QuantSpec,
    shares: Float[Array, " c"],
) -> Float[Array, "..."]:
    """For every block of the spec the share of its absmax that clips it best.

    Args:
        weight: The kernel as a matrix.
        hessian: Second moments of its inputs.
        spec: Of the kernel; its groups run over K in equal parts.
        shares: To try, the first of equals wins.

    Returns: Of the shape of the kernel's scales, but for blocks over several outputs, where every
        output has its own share: [stack.., groups, N].
    """
    *stack, k, n = weight.shape
    groups = spec.scale_shape(weight.shape)[-2]
    split = hessian.reshape(*stack, groups, k // groups, groups, k // groups)
    # The diagonal blocks: moments between the features of one group.
    diagonal = jnp.moveaxis(jnp.diagonal(split, axis1=-4, axis2=-2), -1, -3)

    def step(best: tuple[Array, Array], share: Array) -> tuple[tuple[Array, Array], None]:
        least, chosen = best
        clipped = _clipped(weight, jnp.broadcast_to(share, least.shape))
        snapped = snap(clipped, spec, find_range(clipped, spec, "minmax"))
        difference = (snapped - weight).reshape(*stack, groups, k // groups, n)
        product = jnp.matmul(diagonal, difference, precision=jax.lax.Precision.HIGHEST)
        error = jnp.sum(difference * product, axis=-2)
        better = error < least
        return (jnp.where(better, error, least), jnp.where(better, share, chosen)), None

    start = (jnp.full((*stack, groups, n), jnp.inf), jnp.ones((*stack, groups, n)))
    (_, chosen), _ = jax.lax.scan(step, start, shares)
    return chosen


def _clipped(
    weight: Float[Array, "*stack k n"], share: Float[Array, "*stack groups n"]
) -> Float[Array, "*stack k n"]:
    *stack, k, n = weight.shape
    groups = share.shape[-2]
    split = weight.reshape(*stack, groups, k // groups, n)
    limit = jnp.max(jnp.abs(split), axis=-2, keepdims=True) * share[..., None, :]
    return jnp.clip(split, -limit, limit).reshape(weight.shape)
