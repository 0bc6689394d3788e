"""How a kernel's product is differentiated, mapped and cut over devices.

A kernel is a box to JAX. Its gradients are those of the definition, which XLA computes; mapping
over x alone adds rows; and a mesh may cut rows, columns and, where groups allow, K.
"""

import dataclasses
import functools
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental.custom_partitioning import custom_partitioning
from jaxtyping import Array

from lowbit_jax.ops import backends
from lowbit_jax.ops.activations import rounded
from lowbit_jax.ops.backends import mosaic
from lowbit_jax.ops.prepared import Meta, Prepared


@dataclasses.dataclass(frozen=True)
class Call:
    """What is static about one product."""

    meta: Meta
    implementation: str
    act: str | None
    dtype: Any


def product(x: Array, matrix: Prepared, implementation: str, act: str | None, dtype: Any) -> Array:
    """x [M, K] @ matrix by one implementation, as `dtype`."""
    if implementation == "xla":
        return backends.get("xla").product(x, matrix, act, dtype)
    call = Call(matrix.meta, implementation, act, jnp.dtype(dtype))
    return _product(x, matrix.words, matrix.scale, matrix.zero_point, call)


@functools.partial(jax.custom_vjp, nondiff_argnums=(4,))
def _product(x: Array, words: Any, scale: Array, zero_point: Array | None, call: Call) -> Array:
    leaves, tree = jax.tree.flatten((words, zero_point))
    return _mapped(call, tree)(x, scale, *leaves)


def _fwd(x, words, scale, zero_point, call):
    return _product(x, words, scale, zero_point, call), (x, words, scale, zero_point)


def _bwd(call, residuals, g):
    x, words, scale, zero_point = residuals

    def definition(x, scale):
        matrix = Prepared(words, scale, zero_point, call.meta)
        return backends.get("xla").product(rounded(x, call.act), matrix, None, call.dtype)

    _, vjp = jax.vjp(definition, x, scale)
    dx, dscale = vjp(g)
    return dx, None, dscale, None


_product.defvjp(_fwd, _bwd)


@functools.cache
def _mapped(call: Call, tree: Any) -> Callable[..., Array]:
    """The kernel as a function of (x, scale, *leaves) that `vmap` turns into more rows."""
    kernel = _partitioned(call, tree)
    mapped = jax.custom_batching.custom_vmap(kernel)

    @mapped.def_vmap
    def rule(size, batched, x, *rest):
        x_batched, *rest_batched = batched
        if x_batched and not any(rest_batched):
            y = mapped(x.reshape(-1, x.shape[-1]), *rest)
            return y.reshape(size, -1, y.shape[-1]), True

        def one(i):
            args = zip((x, *rest), batched, strict=True)
            return mapped(*(arg[i] if is_batched else arg for arg, is_batched in args))

        return jax.lax.map(one, jnp.arange(size)), True

    return mapped


def _run(call: Call, tree: Any, x: Array, scale: Array, *leaves: Array) -> Array:
    """The backend's product of arrays that may be parts of those of `call.meta`."""
    words, zero_point = jax.tree.unflatten(tree, leaves)
    group = call.meta.group
    spec = call.meta.spec
    if group is None and scale.shape[0] == 1 and spec.granularity.k is not None:
        spec = dataclasses.replace(spec, granularity=dataclasses.replace(spec.granularity, k=None))
    meta = dataclasses.replace(call.meta, spec=spec, k=x.shape[1], n=scale.shape[1])
    matrix = Prepared(words, scale, zero_point, meta)
    if call.implementation == "interpret":
        return mosaic.INTERPRETED.product(x, matrix, call.act, call.dtype)
    return backends.get(call.implementation).product(x, matrix, call.act, call.dtype)


def _partitioned(call: Call, tree: Any) -> Callable[..., Array]:
    """The kernel with a rule of how its operands may be cut."""
    run = functools.partial(_run, call, tree)

    def build(*args: Array) -> Array:
        cuts = _Cuts.of(call, args)
        cut = custom_partitioning(run)
        cut.def_partition(
            partition=functools.partial(cuts.partition, run),
            sharding_rule=cuts.rule,
            **cuts.sizes,
        )
        return cut(*args)

    return build


@dataclasses.dataclass(frozen=True)
class _Cuts:
    """How the operands (x, scale, *leaves) of one product may be cut over a mesh.

    Attributes:
        rule: Their axes in Shardy's notation, through which shardings spread.
        sizes: Lengths of its factors that no axis has alone.
        axes: For every operand, which of "m", "k", "n" each of its axes is cut along.
        blocks: Along m, k and n, the largest number of equal parts; 1: not to be cut.
    """

    rule: str
    sizes: dict[str, int]
    axes: tuple[tuple[str | None, ...], ...]
    blocks: dict[str, int]

    @classmethod
    def of(cls, call: Call, args: tuple[Array, ...]) -> "_Cuts":
        """Rows freely, columns freely (in panels where a backend has them), K by whole groups.

        Rows that are rounded as a whole (`act`) need all of K on every device.
        """
        x, scale, *leaves = args
        meta = call.meta
        unit = 32 if meta.group is None else math.lcm(32, meta.group)
        k_blocks = meta.k // unit if meta.k % unit == 0 and call.act is None else 1
        panel = next((leaf.shape[-1] for leaf in leaves if leaf.ndim == 3), 1)
        whole = meta.n % panel == 0  # else the columns are padded, and stay together
        columns = "n" if panel == 1 else "(p l)" if whole else "n"
        sizes: dict[str, int] = {}
        k_of_scale = "k" if scale.shape[0] > 1 else None
        names = ["m k", f"g {columns}"]
        axes: list[tuple[str | None, ...]] = [("m", "k"), (k_of_scale, "n")]
        for i, leaf in enumerate(leaves):
            if leaf.ndim == 3:
                names.append(f"p w{i} l" if whole else f"q w{i} l")
                axes.append(("n" if whole else None, "k", None))
            elif leaf.shape == scale.shape and leaf.dtype == jnp.uint8:
                names.append(names[1])
                axes.append(axes[1])
            else:
                names.append(f"w{i} {columns}")
                axes.append(("k", "n"))
        blocks = {"m": x.shape[0], "k": k_blocks, "n": meta.n // panel if whole else 1}
        return cls(f"{', '.join(names)} -> m {columns}", sizes, tuple(axes), blocks)

    def partition(self, run: Callable[..., Array], mesh: Any, arguments: Any, result: Any) -> Any:
        """See `custom_partitioning`: the local program and the shardings it wants."""
        x_spec = (*arguments[0].sharding.spec, None, None)
        out_spec = (*result.sharding.spec, None, None)
        cut: dict[str | None, Any] = {None: None}
        used: set[str] = set()
        for name, wanted in (("m", x_spec[0]), ("n", out_spec[1]), ("k", x_spec[1])):
            mesh_axes = wanted if isinstance(wanted, tuple) else (wanted,) if wanted else ()
            parts = math.prod(mesh.shape[axis] for axis in mesh_axes)
            fits = self.blocks[name] % parts == 0 and not used & set(mesh_axes)
            cut[name] = mesh_axes if mesh_axes and fits else None
            used |= set(mesh_axes) if fits else set()

        def lower(*args: Array) -> Array:
            y = run(*args)
            return y if cut["k"] is None else jax.lax.psum(y, cut["k"])

        def place(*names: str | None) -> jax.NamedSharding:
            spec = jax.sharding.PartitionSpec(*(cut[name] for name in names))
            return jax.NamedSharding(mesh, spec)

        return mesh, lower, place("m", "n"), tuple(place(*names) for names in self.axes)
