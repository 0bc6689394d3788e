"""GPTQ: rounding one input row after the other, the rest of the kernel making good each error.

With H the second moments of a layer's inputs and H^-1 = U^T U (U upper triangular), the rows of the
kernel W [K, N] are visited in order (arXiv:2210.17323, Algorithm 1, transposed to our layout):

    q_i = Q(w_i);  e = (w_i - q_i) / U_ii;  W[i+1:] -= U[i, i+1:]^T e

Rows are visited in blocks; what a block does to the rows behind it is one product ("lazy batches"),
which changes nothing but the order of the sums. The ranges of groups are found from the
weights before any is rounded (`static_groups`), or when the first row of a group is reached.

Any format that can be rounded to nearest will do: Q is this library's `snap`.

Differences from the authors' program: inputs that calibration never excited are rounded to nearest,
not set to zero; without `static_groups`, a group's range is found from weights that everything
before it has updated (theirs lags behind by what its block of 128 rows has not applied yet, so that
inside a block it is static).
"""

import dataclasses
import functools
from typing import Any, Literal, override

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Float, Int32

from lowbit_jax.blocks import BlockView
from lowbit_jax.grid import Range, snap
from lowbit_jax.ptq.ranges import RangeName, check_range, find_range, snapped
from lowbit_jax.ptq.solver import LayerSolver
from lowbit_jax.ptq.stage import LayerProblem, LayerSolution
from lowbit_jax.spec import Block, PerChannel, QuantSpec

_HIGHEST = lax.Precision.HIGHEST
Order = Literal["none", "activation", "group"]


@dataclasses.dataclass(frozen=True)
class GPTQ(LayerSolver):
    """GPTQ (arXiv:2210.17323), with error propagation from the float model if asked for.

    `propagation` moves the layer's target before it is solved,

        W* = W + p H^-1 E[x (x_float - x)^T] W,

    to the kernel whose output on the quantized model's inputs is nearest to the float model's
    output (QEP, arXiv:2504.09629; with p = 1 the asymmetric calibration of GPTAQ,
    arXiv:2504.02692).

    Attributes:
        range: How ranges are found; see `ranges.find_range`. The paper's is "minmax"; its program's
            option `mse` is "mse".
        order: In which order rows are visited: "none" as they come, "activation" by falling second
            moment (act-order), "group" whole groups by their largest moment and rows inside a group
            by falling moment, so that groups stay together.
        static_groups: Ranges of all groups from the weights before any is rounded; False: when
            the first row of a group is reached, from the weights as they then are. Always so with
            act-order, where the rows of a group lie apart.
        damping: Added to the diagonal of H, as a share of its mean; ten times as much for every
            failure of its factorization, up to the mean itself; then the layer is rounded to
            nearest, which its note says.
        propagation: Share p in [0, 1] of the error of all layers before that is made good.
        block_rows: Rows of a lazy batch.
    """

    range: RangeName = "minmax"
    order: Order = "none"
    static_groups: bool = True
    damping: float = 0.01
    propagation: float = 0.0
    block_rows: int = 128

    def __post_init__(self):
        check_range("GPTQ", self.range)
        if self.order not in ("none", "activation", "group"):
            raise ValueError(f"GPTQ: order={self.order!r} is not of none, activation, group.")
        if not 0 < self.damping <= 1:
            raise ValueError(f"GPTQ: damping={self.damping} is not in (0, 1].")
        if not 0 <= self.propagation <= 1:
            raise ValueError(f"GPTQ: propagation={self.propagation} is not in [0, 1].")
        if self.block_rows < 1:
            raise ValueError(f"GPTQ: block_rows={self.block_rows} is below 1.")

    @override
    def solve(self, problem: LayerProblem, key: jax.Array) -> LayerSolution:
        assert problem.hessian is not None
        importance = jnp.diagonal(problem.hessian, axis1=-2, axis2=-1)
        weight, upper, damping = problem.weight, None, self.damping
        hessian = _without_dead(problem.hessian)
        order = _order(importance, self.order, _group_rows(problem.spec, weight.shape[-2]))
        while upper is None and damping <= 1:
            factor = _factor(hessian, order, jnp.float32(damping))
            upper = factor if bool(jnp.isfinite(factor).all()) else None
            damping = damping if upper is not None else damping * 10
        if upper is None:
            range_ = find_range(
                weight, problem.spec, self.range, quantizer=problem.quantizer, importance=importance
            )
            note = "the Hessian could not be factorized at any damping: rounded to nearest"
            return LayerSolution(snapped(weight, problem.spec, range_), range_, {"message": note})
        if problem.drift is not None:
            weight = _propagated(
                weight, hessian, problem.drift, jnp.float32(damping), jnp.float32(self.propagation)
            )
        # Frozen dataclasses are static arguments: one program for each spec and shape.
        solved, range_ = _solve_stack(self, problem.spec, problem.quantizer)(
            weight, upper, order, importance
        )
        dead = int(jnp.sum(importance <= 0))
        info: dict[str, Any] = {"damping": damping} | ({"dead_inputs": dead} if dead else {})
        return LayerSolution(snapped(solved, problem.spec, range_), range_, info)


@jax.jit
def _without_dead(hessian: Array) -> Array:
    """Ones on the diagonal where an input was always zero: such rows are rounded on their own."""
    diagonal = jnp.diagonal(hessian, axis1=-2, axis2=-1)
    dead = (diagonal <= 0)[..., None, :]
    return jnp.where((_eye(hessian) > 0) & dead, 1.0, hessian)


def _eye(like: Array) -> Array:
    return jnp.broadcast_to(jnp.eye(like.shape[-1], dtype=like.dtype), like.shape)


def _group_rows(spec: QuantSpec, k: int) -> int:
    return spec.granularity.k or k


@functools.partial(jax.jit, static_argnames=("order", "rows"))
def _order(importance: Float[Array, "*s k"], order: Order, rows: int) -> Int32[Array, "*s k"]:
    if order == "none":
        k = importance.shape[-1]
        return jnp.broadcast_to(jnp.arange(k, dtype=jnp.int32), importance.shape)
    if order == "activation":
        return jnp.argsort(-importance, axis=-1).astype(jnp.int32)
    grouped = importance.reshape(*importance.shape[:-1], -1, rows)
    by_group = jnp.argsort(-grouped.max(-1), axis=-1)
    first = jnp.arange(0, importance.shape[-1], rows)[:, None]
    inside = jnp.argsort(-grouped, axis=-1) + jnp.broadcast_to(first, (*grouped.shape[:-1], 1))
    picked = jnp.take_along_axis(inside, by_group[..., None], axis=-2)
    return picked.reshape(importance.shape).astype(jnp.int32)


@jax.jit
def _factor(hessian: Array, order: Array, damping: Array) -> Array:
    """U of H^-1 = U^T U for the damped Hessian in the given order; NaN where it fails."""
    ordered = jnp.take_along_axis(
        jnp.take_along_axis(hessian, order[..., None], axis=-2), order[..., None, :], axis=-1
    )
    lower = jnp.linalg.cholesky(_damped(ordered, damping))
    half = lax.linalg.triangular_solve(lower, _eye(hessian), left_side=True, lower=True)
    inverse = jnp.matmul(jnp.swapaxes(half, -1, -2), half, precision=_HIGHEST)
    return jnp.swapaxes(jnp.linalg.cholesky(inverse), -1, -2)


def _damped(hessian: Array, damping: Array) -> Array:
    mean = jnp.mean(jnp.diagonal(hessian, axis1=-2, axis2=-1), axis=-1)[..., None, None]
    return hessian + damping * mean * _eye(hessian)


@jax.jit
def _propagated(weight: Array, hessian: Array, drift: Array, damping: Array, share: Array) -> Array:
    lower = jnp.linalg.cholesky(_damped(hessian, damping))
    moved = jnp.matmul(jnp.swapaxes(drift, -1, -2), weight, precision=_HIGHEST)
    half = lax.linalg.triangular_solve(lower, moved, left_side=True, lower=True)
    return weight + share * lax.linalg.triangular_solve(
        lower, half, left_side=True, lower=True, transpose_a=True
    )


@functools.lru_cache(maxsize=64)
def _solve_stack(gptq: GPTQ, spec: QuantSpec, quantizer: Any) -> Any:
    """The compiled solver of one kind of layer, over any leading axes."""

    def solve(weight: Array, upper: Array, order: Array, importance: Array) -> Any:
        f = functools.partial(_solve, gptq, spec, quantizer)
        for _ in range(weight.ndim - 2):
            f = jax.vmap(f)
        return f(weight, upper, order, importance)

    return jax.jit(solve)


def _solve(
    gptq: GPTQ,
    spec: QuantSpec,
    quantizer: Any,
    weight: Float[Array, "k n"],
    upper: Float[Array, "k k"],
    order: Int32[Array, " k"],
    importance: Float[Array, " k"],
) -> tuple[Array, Range]:
    """The kernel on its grid, in its own order of rows, and its range."""
    k = weight.shape[0]
    inverse = jnp.argsort(order)
    ordered = weight[order]
    rows = _group_rows(spec, k)
    dynamic = rows < k and not (
        gptq.static_groups
        or gptq.order == "activation"
        or spec.has_global_scale  # which spans all groups, as a second level may
        or spec.second is not None
        or spec.granularity != Block(rows, 1)
    )
    if dynamic:
        solved, scale, zero_point = _solve_groups(
            gptq, spec, quantizer, ordered, upper, importance[order], rows
        )
        # Groups stay together in every order that comes here.
        back = jnp.argsort(order[::rows] // rows)
        range_ = Range(scale[back], None if zero_point is None else zero_point[back])
        return solved[inverse], range_
    range_ = find_range(weight, spec, gptq.range, quantizer=quantizer, importance=importance)
    row_spec = dataclasses.replace(spec, granularity=PerChannel(), second=None)
    view = BlockView.of(weight.shape, spec)
    scale = view.spread(range_.scale)[order]
    zero = None if range_.zero_point is None else range_.zero_point
    zero = None if zero is None else view.spread(zero)[order]
    size = min(gptq.block_rows, k)
    pad = -k % size

    def quantize(start: Array, i: Array, row: Array) -> Array:
        at = functools.partial(lax.dynamic_slice_in_dim, start_index=start + i, slice_size=1)
        zero_row = None if zero is None else at(_padded(zero, pad, 0.0))
        one = Range(at(_padded(scale, pad, 1.0)), zero_row, range_.global_scale)
        return snap(row, row_spec, one)

    solved = _visit(_padded(ordered, pad, 0.0), _padded_factor(upper, pad), size, quantize)
    return solved[:k][inverse], range_


def _padded(x: Array, rows: int, value: float) -> Array:
    return jnp.pad(x, ((0, rows), (0, 0)), constant_values=np.float32(value))


def _padded_factor(upper: Array, rows: int) -> Array:
    k = upper.shape[0]
    eye = jnp.eye(k + rows, dtype=upper.dtype)
    return jnp.pad(upper, ((0, rows), (0, rows))) + eye * (jnp.arange(k + rows) >= k)[:, None]


def _visit(weight: Array, upper: Array, size: int, quantize: Any) -> Array:
    """Algorithm 1 in blocks of `size` rows; `quantize(start, i, row)` rounds row `start + i`."""

    def block(b: Array, weight: Array) -> Array:
        start = b * size
        solved, errors = _visit_block(
            lax.dynamic_slice_in_dim(weight, start, size),
            lax.dynamic_slice(upper, (start, start), (size, size)),
            functools.partial(quantize, start),
        )
        weight = _update_behind(weight, upper, errors, start, size)
        return lax.dynamic_update_slice_in_dim(weight, solved, start, axis=0)

    return lax.fori_loop(0, weight.shape[0] // size, block, weight)


def _visit_block(weight: Array, upper: Array, quantize: Any) -> tuple[Array, Array]:
    """Rounds the rows of one block; returns them and their errors e."""
    size = weight.shape[0]

    def row(i: Array, carry: tuple[Array, Array]) -> tuple[Array, Array]:
        weight, errors = carry
        w = lax.dynamic_slice_in_dim(weight, i, 1)
        q = quantize(i, w)
        u = lax.dynamic_slice_in_dim(upper, i, 1)
        error = (w - q) / lax.dynamic_slice_in_dim(u, i, 1, axis=1)
        behind = jnp.where(jnp.arange(size)[None, :] > i, u, 0.0)
        weight = weight - behind.T * error
        weight = lax.dynamic_update_slice_in_dim(weight, q, i, axis=0)
        return weight, lax.dynamic_update_slice_in_dim(errors, error, i, axis=0)

    return lax.fori_loop(0, size, row, (weight, jnp.zeros_like(weight)))


def _update_behind(weight: Array, upper: Array, errors: Array, start: Array, size: int) -> Array:
    u = lax.dynamic_slice_in_dim(upper, start, size)
    behind = jnp.where(jnp.arange(weight.shape[0])[None, :] >= start + size, u, 0.0)
    return weight - jnp.matmul(behind.T, errors, precision=_HIGHEST)


def _solve_groups(
    gptq: GPTQ,
    spec: QuantSpec,
    quantizer: Any,
    weight: Array,
    upper: Array,
    importance: Array,
    rows: int,
) -> tuple[Array, Array, Array | None]:
    """Like `_visit` with a block for each group, whose range is found when it is reached."""
    group_spec = dataclasses.replace(spec, granularity=PerChannel())
    if gptq.range == "scheme":
        quantizer = dataclasses.replace(quantizer, spec=group_spec)

    def group(weight: Array, b: Array) -> tuple[Array, tuple[Array, Array | None]]:
        start = b * rows
        part = lax.dynamic_slice_in_dim(weight, start, rows)
        range_ = find_range(
            part,
            group_spec,
            gptq.range,
            quantizer=quantizer,
            importance=lax.dynamic_slice_in_dim(importance, start, rows),
        )
        solved, errors = _visit_block(
            part,
            lax.dynamic_slice(upper, (start, start), (rows, rows)),
            lambda i, row: snap(row, group_spec, range_),
        )
        weight = _update_behind(weight, upper, errors, start, rows)
        weight = lax.dynamic_update_slice_in_dim(weight, solved, start, axis=0)
        return weight, (
            range_.scale[0],
            None if range_.zero_point is None else range_.zero_point[0],
        )

    weight, (scale, zero) = lax.scan(group, weight, jnp.arange(weight.shape[0] // rows))
    return weight, scale, zero
