"""Saving and loading of a whole model.

A checkpoint is a folder: `manifest.json` and `arrays/` (an orbax tree). It appears under its name
only when it is complete: everything is written beside it first and renamed last.
"""

import json
from typing import Any, Literal

import jax
import orbax.checkpoint as ocp
from etils import epath
from flax import nnx

from lowbit_jax import version
from lowbit_jax.checkpoint import tree as trees
from lowbit_jax.checkpoint.manifest import ARRAYS, FILE, SCHEMA, previous_of, read_manifest
from lowbit_jax.models import build, family_of, param_shardings
from lowbit_jax.nn import PackedTwin
from lowbit_jax.recipe import Recipe
from lowbit_jax.surgery import pack_model, quantize_model, quantized_layers, recipe_of

Kind = Literal["float", "train", "packed"]


def save(
    path: epath.PathLike,
    model: nnx.Module,
    *,
    metadata: dict[str, Any] | None = None,
    overwrite: bool = False,
) -> None:
    """Writes a float, quantized or packed model.

    Args:
        path: Folder to create.
        model: Of any class; one of a registered family is rebuilt by `load` without further help.
        metadata: JSON-able extras (a tokenizer, provenance), found again in the manifest.
        overwrite: Whether an existing checkpoint at `path` is replaced, once the new one is
            complete.

    Raises:
        ValueError: `path` exists and `overwrite` is False.
    """
    path = epath.Path(path)
    previous = previous_of(path)
    if previous.exists() and not path.exists():
        previous.rename(path)  # a run that died while it replaced this one
    if path.exists() and not overwrite:
        raise ValueError(f"{path} exists already. Choose another path, or pass overwrite=True.")
    family, config = family_of(model) if _registered(model) else (None, None)
    recipe = recipe_of(model)
    state = nnx.state(model)
    manifest = {
        "schema": SCHEMA,
        "library": f"lowbit_jax {version.__version__}",
        "family": family,
        "config": config,
        "kind": _kind(model),
        "recipe": None if recipe is None else json.loads(recipe.to_json()),
        "tensors": trees.describe(state),
        "metadata": metadata or {},
    }
    text = json.dumps(manifest, indent=1)
    partial = path.parent / f".{path.name}.partial"
    if partial.exists():
        partial.rmtree()
    partial.mkdir(parents=True)
    with ocp.PyTreeCheckpointer() as writer:
        writer.save(partial.resolve() / ARRAYS, trees.to_tree(state))
    (partial / FILE).write_text(text)
    if not path.exists():
        partial.rename(path)
        return
    if previous.exists():
        previous.rmtree()
    path.rename(previous)
    try:
        partial.rename(path)
    except BaseException:
        previous.rename(path)
        raise
    previous.rmtree()


def load(
    path: epath.PathLike, model: nnx.Module | None = None, mesh: jax.sharding.Mesh | None = None
) -> nnx.Module:
    """Reads a model; a packed one never has its dense kernels made.

    Args:
        path: Folder that `save` wrote.
        model: For a model of no registered family: its float self, abstract (`nnx.eval_shape`) or
            not; only its structure is used.
        mesh: Where the arrays go, by the model's sharding table; default one device.

    Raises:
        ValueError: No checkpoint, an unknown schema or family, or arrays that do not belong to the
            manifest.
    """
    path = epath.Path(path)
    manifest = read_manifest(path)
    abstract = _abstract(path, manifest, model)
    graphdef, state = nnx.split(abstract)
    expected = trees.describe(state)
    if expected != manifest["tensors"]:
        differing = sorted(
            name
            for name in set(expected) | set(manifest["tensors"])
            if expected.get(name) != manifest["tensors"].get(name)
        )
        raise ValueError(
            f"{path}: {len(differing)} tensors differ from what the manifest's model has, the "
            f"first being {differing[0]}: {manifest['tensors'].get(differing[0])} on disk, "
            f"{expected.get(differing[0])} in the model."
        )
    target = _placed(trees.to_tree(state), mesh)
    try:
        with ocp.PyTreeCheckpointer() as reader:
            restored = reader.restore(
                (path / ARRAYS).resolve(),
                args=ocp.args.PyTreeRestore(
                    item=target, restore_args=ocp.checkpoint_utils.construct_restore_args(target)
                ),
            )
    except Exception as error:  # orbax raises the bare class for a chunk that cannot be decoded
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise ValueError(
            f"{path / ARRAYS}: the arrays cannot be read ({reason}). The folder is truncated or "
            "damaged; restore it from a copy."
        ) from error
    return nnx.merge(graphdef, trees.from_tree(restored, state))


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
        if recipe and not any(True for _ in quantized_layers(made)):
            made = quantize_model(made, recipe)
        if manifest["kind"] == "packed" and _kind(made) != "packed":
            made = pack_model(made)
        return made

    return nnx.eval_shape(make, given)


def _placed(tree: dict[str, Any], mesh: jax.sharding.Mesh | None) -> dict[str, Any]:
    """The abstract tree with a sharding for every array."""
    if mesh is None:
        sharding = jax.sharding.SingleDeviceSharding(jax.devices()[0])
        shardings = jax.tree.map(lambda _: sharding, tree)
    else:
        shardings = param_shardings(tree, mesh)
    return jax.tree.map(
        lambda leaf, sharding: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding),
        tree,
        shardings,
    )


def _kind(model: nnx.Module) -> Kind:
    twins = [twin for _, twin in quantized_layers(model)]
    if not twins:
        return "float"
    return "packed" if any(isinstance(twin, PackedTwin) for twin in twins) else "train"


def _registered(model: nnx.Module) -> bool:
    try:
        family_of(model)
    except ValueError:
        return False
    return True
