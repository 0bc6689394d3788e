"""Quantized tensors of a file into a packed decoder: the codes are kept, no dense kernel is made.

One layer is read and decoded at a time. What they are quantized as becomes a recipe of fixed
ranges; the recipe makes the packed model as shapes, the same way as a checkpoint of ours is loaded;
then every leaf gets its array.
"""

import re
from collections.abc import Callable, Collection, Mapping
from typing import Any, Protocol

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from lowbit_jax.interop.codecs.parts import Kernel
from lowbit_jax.interop.weights import TensorSource, fill, layer_name
from lowbit_jax.models import Decoder, DecoderConfig
from lowbit_jax.nn import Packed
from lowbit_jax.qtensor import QTensor, with_one_level
from lowbit_jax.quantizers import FixedRange, Quantizer
from lowbit_jax.recipe import Recipe, Rule
from lowbit_jax.scheme import LayerScheme
from lowbit_jax.surgery import pack_model, quantize_model, quantized_layers


class PackedSource(TensorSource, Protocol):
    """Tensors of which some are quantized."""

    @property
    def quantized(self) -> Collection[str]:
        """Names of the tensors that have a kernel."""

    def kernel(self, name: str) -> Kernel:
        """A quantized tensor's codes and scales, [in, out]."""

    def input(self, name: str) -> Quantizer | None:
        """How the inputs of its layer are quantized."""

    def input_state(self, name: str) -> Mapping[str, np.ndarray]:
        """State of that quantizer."""


def fill_packed(
    config: DecoderConfig,
    source: PackedSource,
    table: Mapping[str, str],
    *,
    prepare: Callable[[str, np.ndarray], np.ndarray] = lambda path, tensor: tensor,
    columns: Callable[[str], np.ndarray | None] = lambda path: None,
    unused: str = "",
) -> Decoder:
    """The decoder of `config` with a packed twin for each quantized tensor; else as `fill_decoder`.

    Args:
        config: Whose layers and sizes are those of `source`.
        source: Where the tensors are.
        table: The tensors' names by path.
        prepare: As of `fill`, for the float ones.
        columns: For a kernel's path, the file's output that each of ours is; None: the same.
        unused: As of `fill`.
    Raises:
        ValueError: As `fill`, or a layer's tensors do not belong together.
        NotImplementedError: A scheme that is not known here.
    """

    def make() -> Decoder:
        return Decoder(config, rngs=nnx.Rngs(0))

    float_state = nnx.to_flat_state(nnx.state(nnx.eval_shape(make)))
    given: dict[str, Any] = {}
    schemes: dict[LayerScheme, list[str]] = {}
    for key, _ in float_state:
        path = "/".join(map(str, key))
        name = layer_name(table, path)
        if name in source.quantized:
            layer, _, _ = path.rpartition("/")
            kernel = reordered(source.kernel(name), columns(path))
            given |= _leaves(path, kernel)
            for part, value in source.input_state(name).items():
                given[f"{layer}/input_{part}"] = jnp.asarray(value)
            weight = FixedRange(kernel.qtensor.spec)
            scheme = LayerScheme(weight=weight, input=source.input(name))
            schemes.setdefault(scheme, []).append(re.escape(layer))
    recipe = Recipe(*(Rule("|".join(paths), scheme) for scheme, paths in schemes.items()))
    abstract = nnx.eval_shape(lambda: pack_model(quantize_model(make(), recipe)))
    for path, twin in quantized_layers(abstract):
        for extra in ("input_permutation", "kernel_global_divisor"):
            if f"{path}/{extra}" in given:
                setattr(twin, extra, Packed(given[f"{path}/{extra}"]))
    _check_leaves(abstract, given, source.where)
    filled = fill(
        abstract,
        _Rest(source),
        lambda path: layer_name(table, path),
        prepare=prepare,
        unused=unused,
        given=given,
    )
    assert isinstance(filled, Decoder)
    return filled


def reordered(kernel: Kernel, columns: np.ndarray | None) -> Kernel:
    """The kernel whose output j is output `columns[j]` of the given one."""
    if columns is None:
        return kernel
    q, n = with_one_level(kernel.qtensor), kernel.qtensor.shape[1]
    index = jnp.asarray(columns)

    def taken(array: Any) -> Any:
        return array if array is None or array.shape[-1] != n else jnp.take(array, index, axis=-1)

    moved = QTensor(
        words=tuple(jnp.take(plane, index, axis=-1) for plane in q.words),
        scale=taken(q.scale),
        zero_point=taken(q.zero_point),
        global_scale=q.global_scale,
        spec=q.spec,
        k=q.k,
        dtype=q.dtype,
    )
    return Kernel(moved, kernel.input_permutation, kernel.global_divisor)


def _leaves(path: str, kernel: Kernel) -> dict[str, Any]:
    layer = path.rpartition("/")[0]
    leaves: dict[str, Any] = {path: kernel.qtensor}
    if kernel.input_permutation is not None:
        leaves[f"{layer}/input_permutation"] = jnp.asarray(kernel.input_permutation)
    if kernel.global_divisor is not None:
        leaves[f"{layer}/kernel_global_divisor"] = jnp.asarray(kernel.global_divisor)
    return leaves


class _Rest:
    """The tensors that are read as floats."""

    def __init__(self, source: PackedSource):
        self.where, self.read, taken = source.where, source.read, source.quantized
        self.shapes = {name: shape for name, shape in source.shapes.items() if name not in taken}


def _check_leaves(abstract: nnx.Module, given: Mapping[str, Any], where: str) -> None:
    """Refuses values that are not what the model has in their place."""
    leaves = {
        "/".join(map(str, key)): variable.get_value()
        for key, variable in nnx.to_flat_state(nnx.state(abstract))
    }
    for path, value in given.items():
        found, wanted = _describe(value), _describe(leaves.get(path))
        if found != wanted:
            raise ValueError(
                f"{where}: {path} is {found} in the file, and the model that the configuration "
                f"describes has {wanted} there."
            )


def _describe(value: Any) -> str:
    parts = [f"{leaf.dtype}{list(leaf.shape)}" for leaf in jax.tree.leaves(value)]
    spec = f"{value.spec.describe()}: " if isinstance(value, QTensor) else ""
    return spec + ", ".join(parts) if parts else "nothing"
