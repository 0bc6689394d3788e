"""Hadamard matrices, and a linear layer whose inputs are rotated by one when it is called.

A Hadamard matrix has entries +-1 and orthogonal rows; divided by sqrt(n) it is a rotation that
spreads every feature evenly over all of them. One of order n = m * 2^k is the Kronecker product of
one of order m and Sylvester's of order 2^k, so that multiplying by it costs n * (m + k) operations
and stores m^2 signs. Orders m that are built here:

- 1 and 2 (Sylvester), q + 1 for primes q = 3 mod 4, 2 (q + 1) for primes q = 1 mod 4
  (R. E. A. C. Paley, J. Math. Phys. 12, 1933);
- 172 = 4 * 43 (J. Williamson, Duke Math. J. 11, 1944), which Paley does not reach and which
  feed-forward widths of 172 * 2^k (Llama-7B's 11008) ask for.
"""

import functools
import math
from typing import Any, Final

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float

# The largest matrix that is kept dense.
_LARGEST_BASE: Final = 1024
# Signs of Williamson's circulants A, B, C, D of order 43 on the orbits of the six sixth roots of
# unity mod 43, in the order of the orbits' least members; every diagonal is +1.
_WILLIAMSON_43: Final = (
    (1, 1, 1, 1, -1, -1, -1),
    (1, 1, -1, -1, -1, -1, 1),
    (1, -1, 1, -1, 1, -1, 1),
    (-1, 1, 1, -1, -1, 1, 1),
)


def hadamard_base(order: int) -> int | None:
    """The least m with order = m * 2^k for which a Hadamard matrix is built here; None: no such."""
    odd = order
    while odd > 1 and odd % 2 == 0:
        odd //= 2
    base = odd
    while base <= min(order, _LARGEST_BASE):
        if base in (1, 172) or _paley_prime(base) is not None:
            return base
        base *= 2
    return None


@functools.lru_cache(maxsize=32)
def signs(order: int) -> np.ndarray:
    """A Hadamard matrix with entries +-1, int8 [order, order].

    Raises:
        ValueError: None of this order is built here (see `hadamard_base`).
    """
    base = hadamard_base(order)
    if base is None:
        raise ValueError(
            f"no Hadamard matrix of order {order} is built here: the order has to be 2^k times 1, "
            "172, p + 1 (prime p = 3 mod 4) or 2 (p + 1) (prime p = 1 mod 4)."
        )
    matrix = _base_signs(base)
    while len(matrix) < order:
        matrix = np.kron(matrix, np.array([[1, 1], [1, -1]]))
    return matrix.astype(np.int8)


def hadamard(order: int) -> np.ndarray:
    """An orthogonal matrix with entries +-1/sqrt(order), float64 [order, order].

    Raises:
        ValueError: As of `signs`.
    """
    return signs(order) / math.sqrt(order)


def random_orthogonal(order: int, key: jax.Array) -> np.ndarray:
    """An orthogonal matrix drawn uniformly (Haar), float64 [order, order]."""
    gaussian = np.asarray(jax.random.normal(key, (order, order)), np.float64)
    q, r = np.linalg.qr(gaussian)
    return q * np.sign(np.diag(r))[None, :]  # with R's diagonal positive, Q is Haar distributed


@jax.jit
def apply_hadamard(x: Float[Array, "*batch n"]) -> Float[Array, "*batch n"]:
    """`x @ hadamard(n)` in float32, without the matrix: n * (m + k) operations a row."""
    order = x.shape[-1]
    base = hadamard_base(order)
    if base is None:
        signs(order)  # raises
    assert base is not None
    length = order // base
    y = x.astype(jnp.float32).reshape(*x.shape[:-1], base, length)
    if base > 1:
        matrix = jnp.asarray(_base_signs(base), jnp.float32)
        y = jnp.einsum("...mp,mn->...np", y, matrix, precision=jax.lax.Precision.HIGHEST)
    half = 1
    while half < length:  # the fast Walsh-Hadamard transform, one butterfly a step
        pairs = y.reshape(*x.shape[:-1], base, length // (2 * half), 2, half)
        first, second = pairs[..., 0, :], pairs[..., 1, :]
        y = jnp.stack([first + second, first - second], axis=-2)
        half *= 2
    return (y.reshape(x.shape) * np.float32(1 / math.sqrt(order))).astype(x.dtype)


class RotationMatrix(nnx.Variable):
    """A fixed orthogonal matrix; not an nnx.Param: neither trained nor quantized."""


class Rotation(nnx.Module):
    """Multiplies features by a fixed orthogonal matrix: x @ (R kron I).

    Features are `size` groups of `inner`, and R mixes the groups: with `inner` the width of a head,
    the heads. R is Hadamard's and takes no memory, or, where none of this size is built, `matrix`.

    Attributes:
        size: Order of R.
        inner: Features that stay side by side; 1: R mixes single features.
        matrix: R [size, size] if it is not Hadamard's.
    """

    def __init__(self, size: int, inner: int = 1, matrix: Array | None = None):
        if matrix is None and hadamard_base(size) is None:
            signs(size)  # raises
        self.size = size
        self.inner = inner
        self.matrix = nnx.data(None) if matrix is None else RotationMatrix(matrix)

    @classmethod
    def of(cls, size: int, inner: int = 1) -> "Rotation":
        """The rotation of this size: Hadamard's, or the identity where a matrix has to be given.

        A model that is built from its configuration gets the matrix from its checkpoint.
        """
        known = hadamard_base(size) is not None
        return cls(size, inner, None if known else jnp.eye(size))

    def __call__(self, x: Float[Array, "*batch n"]) -> Float[Array, "*batch n"]:
        """Rotates the last axis, in float32; the dtype stays."""
        y = x.reshape(*x.shape[:-1], self.size, self.inner).swapaxes(-1, -2)
        if self.matrix is None:
            y = apply_hadamard(y)
        else:
            product = jnp.einsum(
                "...m,mn->...n",
                y.astype(jnp.float32),
                self.matrix[...],
                precision=jax.lax.Precision.HIGHEST,
            )
            y = product.astype(x.dtype)
        return y.swapaxes(-1, -2).reshape(x.shape)

    def dense(self) -> np.ndarray:
        """R kron I, float64 [size * inner, size * inner]."""
        core = hadamard(self.size) if self.matrix is None else np.asarray(self.matrix[...])
        return np.kron(core.astype(np.float64), np.eye(self.inner))


class Rotated(nnx.Module):
    """A layer behind a rotation of its inputs: `linear(rotation(x))`.

    It stands at the layer's own path, and the layer at `PATH/linear`.
    """

    def __init__(self, linear: nnx.Module, rotation: Rotation):
        self.linear = linear
        self.rotation = rotation

    def __call__(self, x: Float[Array, "*batch k"], *args: Any, **kwargs: Any) -> Array:
        """Like the layer's own call."""
        return self.linear(self.rotation(x), *args, **kwargs)  # type: ignore[operator]


def _paley_prime(order: int) -> int | None:
    """The prime from which Paley builds this order, if one does."""
    for prime, remainder in ((order - 1, 3), (order // 2 - 1, 1)):
        if order % 4 == 0 and prime % 4 == remainder and _is_prime(prime):
            return prime
    return None


def _is_prime(n: int) -> bool:
    return n > 1 and all(n % d for d in range(2, math.isqrt(n) + 1))


def _base_signs(base: int) -> np.ndarray:
    """The matrix of an order that `hadamard_base` returned."""
    if base == 1:
        return np.ones((1, 1), int)
    prime = _paley_prime(base)
    if prime is None:
        return _williamson_172()
    residues = {i * i % prime for i in range(1, prime)}
    character = np.array([0 if i == 0 else 1 if i in residues else -1 for i in range(prime)])
    i = np.arange(prime)
    conference = np.ones((prime + 1, prime + 1), int)
    conference[0, 0] = 0
    conference[1:, 1:] = character[(i[:, None] - i[None, :]) % prime]
    if prime % 4 == 3:
        conference[1:, 0] = -1  # skew: Q^T = -Q
        return conference + np.eye(prime + 1, dtype=int)
    plus, minus = np.array([[1, 1], [1, -1]]), np.array([[1, -1], [-1, -1]])
    return np.kron(conference, plus) + np.kron(np.eye(prime + 1, dtype=int), minus)


def _williamson_172() -> np.ndarray:
    order, generator = 43, 3
    roots = [pow(generator, 7 * i, order) for i in range(6)]
    orbits = sorted({tuple(sorted(x * root % order for root in roots)) for x in range(1, order)})
    i = np.arange(order)
    blocks = []
    for orbit_signs in _WILLIAMSON_43:
        row = np.ones(order, int)
        for sign, orbit in zip(orbit_signs, orbits, strict=True):
            row[list(orbit)] = sign
        blocks.append(row[(i[:, None] - i[None, :]) % order])
    a, b, c, d = blocks
    return np.block([[a, b, c, d], [-b, a, -d, c], [-c, d, a, -b], [-d, -c, b, a]])
