"""What a manifest alone says of the disk, so that reading starts before a model is made."""

import functools
import json
from typing import Any

import jax
import jax.numpy as jnp

from lowbit_jax.checkpoint import tree as trees
from lowbit_jax.formats import Learned
from lowbit_jax.grid import Range, Second
from lowbit_jax.qtensor import QTensor, encode
from lowbit_jax.spec import QuantSpec


def planned(tensors: dict[str, Any]) -> dict[str, Any]:
    """The arrays of a manifest's tensors, as a tree of ShapeDtypeStruct; random keys as `raw`.

    Raises:
        ValueError: A shape, dtype or spec that is none, with the tensor's name.
    """
    tree: dict[str, Any] = {}
    for name, entry in tensors.items():
        try:
            value = _struct(entry)
            trees.insert(tree, tuple(name.split("/")), value)
        except (ValueError, TypeError, AttributeError, KeyError, OverflowError) as error:
            raise ValueError(f"{name}: the manifest describes no array ({error}).") from error
    result: dict[str, Any] = jax.eval_shape(trees.raw, tree)
    return result


def _struct(entry: dict[str, Any]) -> Any:
    shape = tuple(entry["shape"])
    if any(type(length) is not int or length < 0 for length in shape):
        raise ValueError(f"shape {entry['shape']}")
    if "spec" in entry:
        qtensor = planned_qtensor(shape, entry["dtype"], json.dumps(entry["spec"]))
        return trees.qtensor_parts(qtensor)
    return jax.ShapeDtypeStruct(shape, _dtype(entry["dtype"]))


def _dtype(name: str) -> Any:
    if name.startswith("key<"):
        impl = trees.key_impl(name)
        return jax.eval_shape(lambda: jax.random.key(0, impl=impl)).dtype
    return jnp.dtype(name)


@functools.lru_cache(maxsize=1024)
def planned_qtensor(shape: tuple[int, ...], dtype: str, spec_json: str) -> QTensor:
    """A QTensor of shapes only; a model has few different ones, and each takes milliseconds."""
    spec = QuantSpec.from_dict(json.loads(spec_json))

    def make() -> QTensor:
        scale_shape = spec.scale_shape(shape)
        one = (*shape[: spec.granularity.axis], *(1,) * -spec.granularity.axis)
        second = None
        if (level := spec.second) is not None:
            offset_shape = level.offset_shape(scale_shape)
            offset = None if offset_shape is None else jnp.zeros(offset_shape)
            second = Second(jnp.ones(level.scale_shape(scale_shape)), offset)
        range_ = Range(
            jnp.ones(scale_shape),
            None if spec.symmetric else jnp.zeros(scale_shape),
            jnp.ones(one) if spec.has_global_scale else None,
            jnp.ones(spec.format.basis_shape(scale_shape))
            if isinstance(spec.format, Learned)
            else None,
            second,
        )
        return encode(jnp.zeros(shape, _dtype(dtype)), spec, range_)

    return jax.eval_shape(make)
