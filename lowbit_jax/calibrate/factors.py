"""Sign-value-independent decomposition: a matrix as its signs times an outer product."""

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float


def sign_value(
    x: Float[Array, "k n"], *, steps: int = 32
) -> tuple[Float[Array, "k"], Float[Array, "n"]]:
    """Vectors g, h >= 0 of least squared error |abs(x) - g h^T|, so that x ~ sign(x) * (g h^T).

    OneBit's SVID (arXiv:2402.11295, section 3.3): the first singular vectors u, v of |x| with
    singular value s, g = sqrt(s) u and h = sqrt(s) v. They are found by power iteration from the
    all-ones vector, whose overlap with a non-negative u is never zero; of a non-negative matrix
    they are non-negative (Perron), and therefore its best non-negative factors as well.

    Args:
        x: A matrix; float32 arithmetic.
        steps: Of the iteration; the error falls by (second / first singular value)**2 a step, below
            1/10 for any matrix of many independent entries.

    Returns: g of the rows and h of the columns; zeros for a matrix of zeros.
    """
    magnitudes = jnp.abs(x.astype(jnp.float32))
    tiny = np.float32(2.0**-100)

    def normalized(v: Array) -> Array:
        return v / jnp.maximum(jnp.sqrt(jnp.sum(v * v)), tiny)

    def step(_: int, v: Array) -> Array:
        u = jnp.dot(magnitudes, v, precision="highest")
        return normalized(jnp.dot(normalized(u), magnitudes, precision="highest"))

    v = jax.lax.fori_loop(0, steps, step, normalized(jnp.ones(x.shape[1], jnp.float32)))
    u = jnp.dot(magnitudes, v, precision="highest")  # singular value times u
    root = jnp.sqrt(jnp.sqrt(jnp.sum(u * u)))
    return u / jnp.maximum(root, tiny), v * root
