"""What the codes of a format stand for, as kernels are told: an affine rule or a table."""

import functools

import jax
import jax.numpy as jnp
import numpy as np

from lowbit_jax.formats import Format, Learned


def why_not(fmt: Format) -> str | None:
    """Why no kernel can be told: its values are arrays; None: they are constants."""
    if isinstance(fmt, Learned):
        return f"the values of {fmt.name} are learned arrays, and kernels take constant ones"
    return None


@functools.cache
def table(fmt: Format) -> tuple[float, ...]:
    """The value of every code, of which there are 2**bits; unused ones repeat the last."""
    with jax.ensure_compile_time_eval():
        values = fmt.decode(jnp.arange(2**fmt.bits, dtype=jnp.uint8))
    return tuple(float(v) for v in np.asarray(values))
