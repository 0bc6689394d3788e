"""How a packed layer multiplies: through `ops.matmul`, inside the float layer's own method.

The float layer is given the packed matrix for a kernel (`q[...]` is q), a `promote_dtype` that
leaves it alone, and a product that knows what to do with it; biases, output shapes and whatever
else the layer does stay Flax's.
"""

import functools
from collections.abc import Callable
from typing import Any, Literal

import jax.numpy as jnp
from jaxtyping import Array

from lowbit_jax.formats import INT8_NARROW
from lowbit_jax.ops import Prepared, matmul
from lowbit_jax.qtensor import QTensor
from lowbit_jax.quantizers import Absmax
from lowbit_jax.scheme import LayerScheme
from lowbit_jax.spec import PerToken, QuantSpec

Matrix = QTensor | Prepared
_INT8: Absmax = Absmax(QuantSpec(format=INT8_NARROW, granularity=PerToken()))


def activation_format(scheme: LayerScheme) -> Literal["int8"] | None:
    """The rounding of inputs that `matmul` does itself, if it is what the scheme asks for."""
    return "int8" if scheme.input == _INT8 else None


def promoted(promote: Callable[..., Any], arrays: Any, *, dtype: Any = None, **kwargs: Any) -> Any:
    """A layer's `promote_dtype` of (input, packed kernel, bias ..), which leaves the kernel packed.

    The kernel counts with the dtype that it dequantizes to.
    """
    x, q, *rest = arrays
    given = [array for array in (x, *rest) if array is not None]
    dtype = dtype or jnp.result_type(q.dtype, *given)
    x, *rest = promote((x, *rest), dtype=dtype, **kwargs)
    return (x, q, *rest)


def product(
    x: Array,
    q: Matrix,
    *,
    rows: Callable[[Array], Array],
    features: tuple[int, ...],
    act: Literal["int8"] | None,
    permutation: Array | None,
    preferred_element_type: Any = None,
) -> Array:
    """x by the packed kernel, as [batch.., features..].

    Args:
        x: The layer's input.
        q: [K, N].
        rows: Brings the contraction of `x` to its end, merged.
        features: Lengths of the output's axes, whose product is N.
        act: See `matmul`.
        permutation: Row r of `q` is row `permutation[r]` of the kernel.
        preferred_element_type: Of the result; default that of `x`.
    """
    x = rows(x)
    if permutation is not None:
        x = jnp.take(x, permutation, axis=-1)
    y = matmul(x, q, act=act, out_dtype=preferred_element_type)
    return y.reshape(*y.shape[:-1], *features)


def operations(promote: Callable[..., Any], multiply: Callable[..., Array]) -> dict[str, Any]:
    """What replaces a linear layer's own attributes; `multiply(x, q, preferred_element_type=)`."""

    def dot_general(x, q, dimension_numbers, *, preferred_element_type=None, **_):
        return multiply(x, q, preferred_element_type=preferred_element_type)

    return {
        "promote_dtype": functools.partial(promoted, promote),
        "dot_general": dot_general,
        "dot_general_cls": None,  # which a LinearGeneral asks first
    }
