"""The model of a manifest without its arrays: the graph that the arrays are put into."""

import functools
import json
from typing import Any, Final, Literal

import jax
import jax.numpy as jnp
from etils import epath
from flax import nnx

from lowbit_jax.checkpoint import tree as trees
from lowbit_jax.checkpoint.plan import planned_qtensor
from lowbit_jax.models import build
from lowbit_jax.nn import Packed, PackedTwin, TrainTwin
from lowbit_jax.qtensor import QTensor
from lowbit_jax.recipe import Recipe
from lowbit_jax.surgery import packed_twin, quantized_layers, quantizing
from lowbit_jax.walk import Replace, rebuilt

Kind = Literal["float", "train", "packed"]

_FREEZE: Final = "freeze_kernel"


def structure(
    path: epath.Path, manifest: dict[str, Any], model: nnx.Module | None
) -> tuple[Any, nnx.State]:
    """The model's graph and abstract state. Raises ValueError unless the manifest lists them."""
    graphdef, state = nnx.split(_abstract(path, manifest, model))
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


def _abstract(path: epath.Path, manifest: dict[str, Any], model: nnx.Module | None) -> nnx.Module:
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

    def make(given: nnx.State | None) -> nnx.Module:
        if given is None:
            made = build(manifest["family"], manifest["config"], nnx.Rngs(0))
        else:
            made = nnx.merge(graphdef, given)
        kind = kind_of(made)
        if recipe and kind == "float":
            quantize = quantizing(made, recipe)
            made = rebuilt(made, _packing(quantize) if manifest["kind"] == "packed" else quantize)
        elif manifest["kind"] == "packed" and kind == "train":
            made = rebuilt(made, _packing(lambda _, module: module))
        for name, twin in quantized_layers(made):
            _add_imported(twin, name, manifest["tensors"])
        return made

    return nnx.eval_shape(make, given)


def _packing(quantize: Replace) -> Replace:
    """Quantizes and packs where only shapes matter: each is traced once for all of its kind."""
    made: dict[Any, QTensor] = {}

    def replace(path: str, module: Any) -> Any:
        twin = quantize(path, module)
        if not isinstance(twin, TrainTwin) or twin.scheme.weight is None:
            return twin
        setattr(twin, _FREEZE, functools.partial(_zeros, twin, made))
        packed = packed_twin(path, twin)
        delattr(twin, _FREEZE)
        return packed

    return replace


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
