"""The laws of formats and quantizers, and the tolerances of sums, for whoever writes a new one.

The law of quantizers: `freeze(x, s).dequantize()` equals `fake_quant(x, s)` bit for bit, in
whatever program it runs. `Law` compiles training, freezing and loading apart, as they are in life:
a program that held two of them would share its arithmetic and hold the law for a wrong reason.

    law = Law([MyQuantizer(spec)], jitted)
    law.check(awkward_array((2, 64, 16), seed=0))

What is compared are bytes, so that +0.0 and -0.0 differ; NaNs are equal to each other.
"""

import itertools
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from lowbit_jax import formats, quantizers
from lowbit_jax.formats import Format
from lowbit_jax.qtensor import QTensor
from lowbit_jax.quantizers import Quantizer, State
from lowbit_jax.scale_formats import SCALE_FORMATS
from lowbit_jax.spec import Granularity, PerChannel, PerGroup, PerTensor, PerToken, QuantSpec

GRANULARITIES: tuple[Granularity, ...] = (
    PerTensor(),
    PerChannel(),
    PerGroup(16),
    PerToken(),
    PerToken(16),
)
Program = Callable[..., Any]
Transform = Callable[[Program], Program]


def admitted(
    classes: Iterable[type[Quantizer]] = quantizers.ALL,
    granularities: Iterable[Granularity] = GRANULARITIES,
) -> Iterator[Quantizer]:
    """Every quantizer that its constructor admits, over all formats and scale formats."""
    for cls, fmt, granularity, scale_format in itertools.product(
        classes, formats.ALL, granularities, SCALE_FORMATS.values()
    ):
        symmetric = not isinstance(fmt, formats.IntGrid) or fmt.signed
        try:
            spec = QuantSpec(
                format=fmt,
                granularity=granularity,
                symmetric=symmetric,
                scale_format=scale_format,
            )
            yield cls(spec)
        except (ValueError, NotImplementedError):
            continue


def awkward_array(
    shape: Sequence[int], seed: int, *, magnitude: float = 1.0, axis: int = -2
) -> np.ndarray:
    """A float32 array with what breaks quantizers, each kind in its own lines along `axis`.

    Normal, zeros of both signs, a constant, ties of integer grids, one outlier, magnitudes over
    many orders, and a line with a single element that is not zero.

    Args:
        shape: Of at least one axis.
        seed: Of the values; the kinds stay where they are.
        magnitude: Of a typical value.
        axis: The axis along which a line runs: that of K.
    """
    rng = np.random.default_rng(seed)
    lines = np.moveaxis(np.empty(shape, np.float32), axis, -1)
    k = lines.shape[-1]
    kinds: tuple[Callable[[], Any], ...] = (
        lambda: rng.normal(size=k),
        lambda: rng.choice([0.0, -0.0], size=k),
        lambda: np.full(k, rng.normal()),
        lambda: rng.integers(-15, 16, size=k) / 2,
        lambda: rng.normal(size=k) + 1e4 * (np.arange(k) == rng.integers(k)),
        lambda: rng.normal(size=k) * 10.0 ** rng.uniform(-6, 1, size=k),
        lambda: rng.normal() * (np.arange(k) == rng.integers(k)),
    )
    for i, index in enumerate(np.ndindex(lines.shape[:-1])):
        lines[index] = kinds[i % len(kinds)]() * magnitude
    return np.ascontiguousarray(np.moveaxis(lines, -1, axis))


def calibrated(quantizer: Quantizer, x: Any) -> State:
    """The state of a quantizer that has seen `x`."""
    return quantizer.observe(x, quantizer.init(x))


def assert_same_bits(actual: Any, expected: Any, what: str = "the result") -> None:
    """Raises AssertionError unless two pytrees of arrays have the same bytes; NaNs are equal."""
    actual_leaves, expected_leaves = jax.tree.leaves(actual), jax.tree.leaves(expected)
    trees = [str(jax.tree.structure(tree)) for tree in (actual, expected)]
    assert trees[0] == trees[1], f"{what}: {trees[0]} is not {trees[1]}"
    for a, b in zip(map(np.asarray, actual_leaves), map(np.asarray, expected_leaves), strict=True):
        assert a.dtype == b.dtype, f"{what}: {a.dtype} is not {b.dtype}"
        assert a.shape == b.shape, f"{what}: shape {a.shape} is not {b.shape}"
        integers = np.dtype(f"uint{a.dtype.itemsize * 8}")
        differ = np.ascontiguousarray(a).view(integers) != np.ascontiguousarray(b).view(integers)
        differ &= (a == a) | (b == b)  # not where both are NaN
        if differ.any():
            index = tuple(int(i) for i in np.argwhere(differ)[0])
            raise AssertionError(
                f"{what}: {differ.sum()} of {a.size} elements differ in their bits, "
                f"first {a[index]!r} instead of {b[index]!r} at {index}."
            )


def eager(f: Program) -> Program:
    """`f` on every slice of its arguments' leading axis, operation by operation."""
    return _by_slices(f)


def jitted(f: Program) -> Program:
    """`f` on every slice, compiled."""
    return _by_slices(jax.jit(f))


def vmapped(f: Program) -> Program:
    """`f` over the leading axis at once, compiled."""
    return jax.jit(jax.vmap(f))


def scanned(f: Program) -> Program:
    """`f` over the leading axis in a loop, compiled."""
    return jax.jit(lambda *stacks: jax.lax.scan(lambda _, args: (None, f(*args)), None, stacks)[1])


def sharded(mesh: jax.sharding.Mesh, *axes: str | None) -> Transform:
    """The transform that cuts the arrays over a mesh: the slices' trailing axes over `axes`."""
    cut = jax.sharding.PartitionSpec(*axes)
    whole = jax.sharding.PartitionSpec()

    def place(leaf: jax.Array) -> jax.Array:
        fits = leaf.ndim == len(axes) and all(
            axis is None or n % mesh.shape[axis] == 0
            for n, axis in zip(leaf.shape, axes, strict=True)
        )
        return jax.device_put(leaf, jax.NamedSharding(mesh, cut if fits else whole))

    def transform(f: Program) -> Program:
        program = jax.jit(f)
        return _by_slices(lambda *args: program(*jax.tree.map(place, args)))

    return transform


def _by_slices(f: Program) -> Program:
    def program(*stacks: Any) -> Any:
        length = jax.tree.leaves(stacks)[0].shape[0]
        slices = [f(*jax.tree.map(lambda leaf, i=i: leaf[i], stacks)) for i in range(length)]
        return jax.tree.map(lambda *leaves: np.stack([np.asarray(x) for x in leaves]), *slices)

    return program


class Law:
    """`fake_quant == freeze -> dequantize` for some quantizers, through one transform.

    The programs are compiled once, at the first check of each shape.

    Args:
        cases: The quantizers; all see the same array.
        transform: How programs run: `eager`, `jitted`, `vmapped`, `scanned` or `sharded(...)`.
    """

    def __init__(self, cases: Sequence[Quantizer], transform: Transform):
        self.cases = tuple(cases)

        def train(x, states):
            return [q.fake_quant(x, s) for q, s in zip(self.cases, states, strict=True)]

        def freeze(x, states):
            return [q.freeze(x, s) for q, s in zip(self.cases, states, strict=True)]

        def load(tensors: list[QTensor]):
            return [q.dequantize() for q in tensors]

        self._train, self._freeze = transform(train), transform(freeze)
        self._load = transform(load)

    def check(
        self, stack: Any, states: Sequence[State] | None = None
    ) -> tuple[list[Any], list[QTensor]]:
        """Raises AssertionError where the law does not hold.

        Args:
            stack: [S, ...]: S arrays.
            states: One per quantizer, each stacked likewise; default: those of `calibrated`.

        Returns:
            The values and the packed arrays of every quantizer, to be compared between transforms.
        """
        stack = jnp.asarray(stack)
        if states is None:
            states = [stacked_state(q, stack) for q in self.cases]
        trained = self._train(stack, list(states))
        frozen = self._freeze(stack, list(states))
        for q, seen, stored in zip(self.cases, trained, self._load(frozen), strict=True):
            assert_same_bits(seen, stored, f"fake_quant of {q} against its frozen array")
        return trained, frozen


def stacked_state(quantizer: Quantizer, stack: Any) -> State:
    """`calibrated` of every slice, stacked."""
    states = [calibrated(quantizer, x) for x in stack]
    return {name: jnp.stack([s[name] for s in states]) for name in states[0]}


def check_format(fmt: Format, v: Any) -> None:
    """Raises AssertionError unless `decode(encode(v)) == round(v)`, bit for bit, and codes fit."""
    v = jnp.asarray(v, jnp.float32)
    codes = np.asarray(fmt.encode(v))
    assert codes.dtype == np.uint8, f"{fmt.name}: codes are {codes.dtype}"
    assert codes.max(initial=0) < 2**fmt.bits, f"{fmt.name}: code {codes.max()} in {fmt.bits} bits"
    assert_same_bits(fmt.decode(jnp.asarray(codes)), fmt.round(v), f"{fmt.name}: decode(encode(v))")


def dot_tolerance(x: Any, w: Any) -> float:
    """How far two float32 sums of the products `x @ w` may lie apart, in units of the result.

    Each sum of k products is within `k * eps / 2 * max|x| * max_n sum_k |w|` of the exact one,
    whatever its order (Higham, Accuracy and Stability of Numerical Algorithms, section 4.2).
    """
    k = np.shape(x)[-1]
    x, w = np.abs(np.asarray(x, np.float64)), np.abs(np.asarray(w, np.float64))
    return float(k * np.finfo(np.float32).eps * x.max() * w.sum(axis=-2).max())
