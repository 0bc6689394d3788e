"""Tensors of a file into the leaves of a model, one at a time.

The model starts abstract, as shapes alone; each leaf is read, brought into our layout and put on
the device before the next one is read. So the most that is in memory is the model and one tensor.
What a configuration says is held against the tensors before anything is made after it.
"""

import re
import types
from collections.abc import Callable, Iterable, Mapping
from typing import Any, Protocol, runtime_checkable

import jax
import numpy as np
from flax import nnx
from jaxtyping import Float32

from lowbit_jax.models import Decoder, DecoderConfig

_SHOWN = 5  # names in a message
# Ours from theirs: a linear layer is (out, in) there, a convolution (out, in, height, width).
_AXES = {2: (1, 0), 4: (2, 3, 1, 0)}


@runtime_checkable
class TensorSource(Protocol):
    """Named tensors of one or more files."""

    where: str
    """The path, for messages."""

    @property
    def shapes(self) -> Mapping[str, tuple[int, ...]]:
        """Of all tensors, as they are stored."""

    def read(self, name: str) -> Float32[np.ndarray, "..."]:
        """A tensor as float32."""


def layer_name(table: Mapping[str, str], path: str) -> str:
    """The tensor's name for a parameter's path.

    Args:
        table: Names by path; `layers/{}/...` and its name stand for every layer.
        path: As in `layers/0/mlp/up/kernel`.
    """
    number = re.match(r"layers/(\d+)/", path)
    if number is None:
        return table[path]
    return table[f"layers/{{}}/{path[number.end() :]}"].format(number[1])


def layer_count(source: TensorSource, pattern: str) -> int:
    """How many layers there are tensors of.

    Args:
        source: Where the tensors are.
        pattern: Matches the begin of a name; group 1 is the layer's number, from 0.
    Raises: ValueError: Numbers are left out.
    """
    found = (re.match(pattern, name) for name in source.shapes)
    numbers = {int(match[1]) for match in found if match}
    if numbers and max(numbers) + 1 != len(numbers):
        raise ValueError(
            f"{source.where}: there are tensors of {len(numbers)} layers, the last of them "
            f"numbered {max(numbers)}: some are missing."
        )
    return len(numbers)


def require_layers(source: TensorSource, pattern: str, claimed: int) -> None:
    """Checks a claimed number of layers. Raises: ValueError: The tensors are of another one."""
    found = layer_count(source, pattern)
    if found != claimed:
        raise ValueError(
            f"{source.where}: the configuration says {claimed} layers, and there are tensors of "
            f"{found}. The file is damaged, or a shard is lacking."
        )


def require_sizes(config: DecoderConfig, source: TensorSource, table: Mapping[str, str]) -> None:
    """Checks the sizes of `config`, so that nothing absurd is made after them.

    Raises: ValueError: The first layer's tensors or the embedding have others.
    """
    width, kv_width = config.heads * config.head_size, config.kv_heads * config.head_size
    wanted = {
        "embed/embedding": (config.vocab, config.dim),
        "layers/0/attention/query/kernel": (width, config.dim),
        "layers/0/attention/key/kernel": (kv_width, config.dim),
        "layers/0/mlp/up/kernel": (config.ffn_dim, config.dim),
    }
    _check_shapes(source, {layer_name(table, path): shape for path, shape in wanted.items()})


def fill_decoder(
    config: DecoderConfig,
    source: TensorSource,
    table: Mapping[str, str],
    *,
    prepare: Callable[[str, np.ndarray], np.ndarray] = lambda path, tensor: tensor,
    unused: str = "",
) -> Decoder:
    """The decoder of `config`, whose layers and sizes are those of `source`; else as `fill`."""
    abstract = nnx.eval_shape(lambda: Decoder(config, rngs=nnx.Rngs(0)))
    return fill(
        abstract, source, lambda path: layer_name(table, path), prepare=prepare, unused=unused
    )


def fill[M: nnx.Module](
    abstract: M,
    source: TensorSource,
    name_of: Callable[[str], str],
    *,
    prepare: Callable[[str, np.ndarray], np.ndarray] = lambda path, tensor: tensor,
    unused: str = "",
    given: Mapping[str, Any] = types.MappingProxyType({}),
) -> M:
    """The model with the arrays of `source`, in the types of `abstract`.

    Args:
        abstract: From `nnx.eval_shape`; its kernels have inputs before outputs.
        source: Where the tensors are.
        name_of: The tensor's name for a parameter's path, `layers/0/mlp/up/kernel`.
        prepare: What happens to a tensor, given its parameter's path, before a kernel's axes are
            put in our order; keeps the shape.
        unused: Full-match regex of the tensors that may be there and are not needed.
        given: Values that are known already, by path, such as QTensors; nothing is read for them.
    Raises: ValueError: A tensor is missing, has another shape, or belongs to no parameter.
    """
    graphdef, state = nnx.split(abstract)
    everything = [("/".join(map(str, key)), key, leaf) for key, leaf in nnx.to_flat_state(state)]
    flat = [item for item in everything if item[0] not in given]
    names = {path: name_of(path) for path, _, _ in flat}
    _check_shapes(source, {names[path]: _stored(path, leaf.shape) for path, _, leaf in flat})
    known = set(names.values())
    extra = [n for n in source.shapes if n not in known and not re.fullmatch(unused, n)]
    if extra:
        raise ValueError(
            f"{source.where}: {len(extra)} tensors belong to no parameter of the model that the "
            f"configuration describes: {_some(extra)}. Without them it would be another model."
        )
    filled = [(key, leaf.replace(given[path])) for path, key, leaf in everything if path in given]
    for path, key, leaf in flat:
        tensor = prepare(path, source.read(names[path]))
        if path.endswith("kernel"):
            tensor = np.ascontiguousarray(tensor.transpose(_AXES[tensor.ndim]))
        filled.append((key, leaf.replace(jax.device_put(tensor.astype(leaf.dtype, copy=False)))))
    return nnx.merge(graphdef, nnx.from_flat_state(filled))


def _stored(path: str, shape: tuple[int, ...]) -> tuple[int, ...]:
    """The shape in the file of the parameter of `shape`."""
    if not path.endswith("kernel"):
        return shape
    order = _AXES[len(shape)]
    return tuple(shape[order.index(axis)] for axis in range(len(shape)))


def _check_shapes(source: TensorSource, wanted: Mapping[str, tuple[int, ...]]) -> None:
    found = source.shapes
    if missing := [name for name in wanted if name not in found]:
        raise ValueError(
            f"{source.where}: {len(missing)} tensors are missing that the configuration asks for: "
            f"{_some(missing)}. The file is of another architecture, or a shard is lacking."
        )
    odd = [
        f"{name} is {found[name]} and not {shape}"
        for name, shape in wanted.items()
        if found[name] != shape
    ]
    if odd:
        raise ValueError(
            f"{source.where}: {len(odd)} tensors do not have the shape that follows from the "
            f"configuration: {_some(odd)}."
        )


def _some(names: Iterable[Any]) -> str:
    names = list(names)
    more = f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else ""
    return ", ".join(map(str, names[:_SHOWN])) + more
