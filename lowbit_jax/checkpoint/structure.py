"""The model of a manifest without its arrays: the graph that the arrays are put into."""

import functools
import json
from collections.abc import Hashable
from typing import Any, Final, Literal

import jax
import jax.numpy as jnp
from etils import epath
from flax import nnx

from lowbit_jax.checkpoint import tree as trees
from lowbit_jax.checkpoint.plan import planned_qtensor
from lowbit_jax.models import build
from lowbit_jax.nn import Packed, PackedTwin, TrainTwin, Twin
from lowbit_jax.qtensor import QTensor
from lowbit_jax.recipe import Recipe
from lowbit_jax.scheme import LayerScheme
from lowbit_jax.surgery import chosen_schemes, packed_twin, quantized_layers, train_twin
from lowbit_jax.walk import layers, rebuilt

Kind = Literal["float", "train", "packed"]

_FREEZE: Final = "freeze_kernel"


def structure(
    path: epath.Path, manifest: dict[str, Any], model: nnx.Module | None
) -> tuple[Any, nnx.State]:
    """The model's graph and abstract state. Raises ValueError unless the manifest lists them."""
    graphdef, state = _abstract(path, manifest, model)
    expected = trees.describe(state)
    listed = {
        name: {key: value for key, value in entry.items() if key != "sha256"}
        for name, entry in manifest["tensors"].items()
    }
    if expected != listed:
        names = set(expected) | set(listed)
        odd = sorted(name for name in names if expected.get(name) != listed.get(name))
        raise ValueError(
            f"{path}: {len(odd)} tensors differ from what the manifest's model has, the first "
            f"being {odd[0]}: {listed.get(odd[0])} on disk, {expected.get(odd[0])} in the model."
        )
    return graphdef, state


def _abstract(
    path: epath.Path, manifest: dict[str, Any], model: nnx.Module | None
) -> tuple[Any, nnx.State]:
    """The checkpoint's model without arrays: made float, then quantized and packed if it is."""
    if model is None and manifest["family"] is None:
        raise ValueError(
            f"{path}: its model is of no registered family. Pass load(path, "
            "model=nnx.eval_shape(...))."
        )
    recipe = manifest["recipe"] and Recipe.from_json(json.dumps(manifest["recipe"]))
    graphdef: Any = None
    given: nnx.State | None = None
    if model is not None:
        graphdef, given = nnx.split(model)

    made_graph: Any = None

    def make(given: nnx.State | None) -> nnx.State:
        nonlocal made_graph
        if given is None:
            made = build(manifest["family"], manifest["config"], nnx.Rngs(0))
        else:
            made = nnx.merge(graphdef, given)
        schemes = {}
        if recipe and kind_of(made) == "float":
            schemes = chosen_schemes(made, recipe)
        packs = manifest["kind"] == "packed"
        made = rebuilt(made, _Quantizing(schemes, packs=packs, alone=not _ties(made)))
        for name, twin in quantized_layers(made):
            _add_imported(twin, name, manifest["tensors"])
        made_graph, state = nnx.split(made)
        return state

    state = jax.eval_shape(make, given)  # nnx.eval_shape would merge what is wanted in parts
    return made_graph, state


class _Quantizing:
    """Quantizes and packs where only shapes matter, for `rebuilt`: layers that are alike once."""

    def __init__(self, schemes: dict[str, LayerScheme], *, packs: bool, alone: bool):
        """Schemes of float layers by path; layers that are twins already have theirs.

        alone: No two layers hold the same variable, which clones would not share.
        """
        self._schemes = schemes
        self._packs = packs
        self._alone = alone
        self._made: dict[Any, Twin] = {}
        self._kernels: dict[Any, QTensor] = {}

    def __call__(self, path: str, module: Any) -> Any:
        scheme = module.scheme if isinstance(module, TrainTwin) else self._schemes.get(path)
        if scheme is None:
            return module
        kind = _kind(module) if self._alone else None
        if kind is None:
            return self._twin(path, module, scheme)
        made = self._made.get((kind, scheme))
        if made is not None:
            return nnx.clone(made)
        made = self._made[kind, scheme] = self._twin(path, module, scheme)
        return made

    def _twin(self, path: str, module: Any, scheme: LayerScheme) -> Twin:
        twin = module if isinstance(module, TrainTwin) else train_twin(path, module, scheme)
        if not self._packs or scheme.weight is None:
            return twin
        setattr(twin, _FREEZE, functools.partial(_zeros, twin, self._kernels))
        packed: Twin = packed_twin(path, twin)
        for layer in (twin, packed):
            if _FREEZE in vars(layer):
                delattr(layer, _FREEZE)
        return packed


def _ties(model: nnx.Module) -> bool:
    """Whether two modules hold the same variable."""
    held = [
        id(value)
        for _, module in layers(model)
        for value in vars(module).values()
        if isinstance(value, nnx.Variable)
    ]
    return len(set(held)) < len(held)


def _kind(module: nnx.Module) -> Any:
    """Equal for layers that differ in the numbers of their variables alone; None: like no other."""
    parts: list[Any] = [type(module)]
    for name, value in vars(module).items():
        if name.startswith("_pytree__"):
            continue
        if isinstance(value, nnx.Variable):
            leaves = [(leaf.shape, leaf.dtype) for leaf in jax.tree.leaves(value.get_value())]
            parts.append((name, type(value), tuple(leaves), repr(value.get_metadata())))
        elif isinstance(value, nnx.Pytree) or not isinstance(value, Hashable):
            return None
        else:
            parts.append((name, value))
    return tuple(parts)


def _zeros(twin: TrainTwin, made: dict[Any, QTensor]) -> QTensor:
    """A QTensor of zeros such as this layer's kernel becomes, kept in `made` for the next."""
    kernel, weight = twin.kernel_variable[...], twin.scheme.weight
    assert weight is not None
    kind = (twin.view, kernel.shape, kernel.dtype, weight)
    if kind not in made:
        matrix = twin.view.to_matrix(kernel)
        spec = json.dumps(weight.spec.to_dict())
        shapes = planned_qtensor(tuple(matrix.shape), str(matrix.dtype), spec)
        made[kind] = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), shapes)
    return made[kind]


def _add_imported(twin: Any, path: str, tensors: dict[str, Any]) -> None:
    """Gives a packed layer what only files of others bring: a row order, a divisor."""
    for name in ("input_permutation", "kernel_global_divisor"):
        entry = tensors.get(f"{path}/{name}")
        if entry is not None and isinstance(twin, PackedTwin) and getattr(twin, name) is None:
            setattr(twin, name, Packed(jnp.zeros(entry["shape"], entry["dtype"])))


def kind_of(model: nnx.Module) -> Kind:
    """Whether a model is float, in training with quantized twins, or packed."""
    twins = [twin for _, twin in quantized_layers(model)]
    if not twins:
        return "float"
    return "packed" if any(isinstance(twin, PackedTwin) for twin in twins) else "train"
