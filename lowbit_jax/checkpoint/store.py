"""Saving and loading of a whole model.

A checkpoint is a folder: `manifest.json` and the folder of arrays that it names (an orbax tree).
What was there stays whole and in use until the new content is complete: see folder.py.
"""

import concurrent.futures
import functools
import json
import operator
from collections.abc import Mapping
from typing import Any

import jax
from etils import epath
from flax import nnx

from lowbit_jax import version
from lowbit_jax.checkpoint import arrays, folder
from lowbit_jax.checkpoint import tree as trees
from lowbit_jax.checkpoint.digests import Digests, differing, digests
from lowbit_jax.checkpoint.manifest import SCHEMA, is_sha256, located, read_manifest
from lowbit_jax.checkpoint.plan import planned
from lowbit_jax.checkpoint.structure import kind_of, structure
from lowbit_jax.checkpoint.vocabulary import check_tokenizer
from lowbit_jax.models import family_of, param_shardings
from lowbit_jax.surgery import recipe_of


def save(
    path: epath.PathLike,
    model: nnx.Module,
    *,
    metadata: Mapping[str, Any] | None = None,
    tokenizer: Mapping[str, Any] | None = None,
    source_sha256: str | None = None,
    calibration_sha256: str | None = None,
    overwrite: bool = False,
) -> None:
    """Writes a float, quantized or packed model; every process of a run calls it.

    Args:
        path: Folder to create, on a file system or behind gs://.
        model: Of any class; one of a registered family is rebuilt by `load` without further help.
        metadata: JSON-able extras (provenance), found again in the manifest.
        tokenizer: JSON-able, from `Tokenizer.to_json`.
        source_sha256: `digest` of the float model that this one was made from.
        calibration_sha256: Of the data that it was calibrated with.
        overwrite: Whether an existing checkpoint at `path` is replaced, once the new one is
            complete. Killed at any moment, it leaves the old one in use.

    Raises:
        ValueError: `path` exists and `overwrite` is False, the tokenizer has tokens that the model
            has no embedding for, a digest is none, or the model was prepared for a backend.
    """
    save_async(
        path,
        model,
        metadata=metadata,
        tokenizer=tokenizer,
        source_sha256=source_sha256,
        calibration_sha256=calibration_sha256,
        overwrite=overwrite,
    ).result()


def save_async(
    path: epath.PathLike,
    model: nnx.Module,
    *,
    metadata: Mapping[str, Any] | None = None,
    tokenizer: Mapping[str, Any] | None = None,
    source_sha256: str | None = None,
    calibration_sha256: str | None = None,
    overwrite: bool = False,
) -> concurrent.futures.Future[None]:
    """`save`, which returns once the model may change (or be donated) and goes on writing.

    Another save to the same path has to wait for it.

    Returns: What is done when the checkpoint is; `result()` waits and raises what went wrong. A
        process that exits waits for it too.
    """
    path = epath.Path(path)
    folder.check_free(path, overwrite=overwrite)
    state = nnx.state(model)
    manifest = _manifest(model, state) | {
        "tokenizer": None if tokenizer is None else dict(tokenizer),
        "source_sha256": source_sha256,
        "calibration_sha256": calibration_sha256,
        "metadata": dict(metadata or {}),
    }
    check_tokenizer(path, manifest)
    for key in ("source_sha256", "calibration_sha256"):
        if manifest[key] is not None and not is_sha256(manifest[key]):
            raise ValueError(f"{path}: {key} {manifest[key]!r} is no SHA-256 of 64 digits.")
    json.dumps(manifest)  # what is no JSON fails before anything is written
    manifest["arrays"] = folder.prepare(path)
    writer = arrays.Writer()
    try:
        writer.start(path / manifest["arrays"], trees.raw(trees.to_tree(state)))
        for name, sha256 in digests(state).items():
            manifest["tensors"][name]["sha256"] = sha256
    except BaseException:
        writer.close()
        raise
    text = json.dumps(manifest, indent=1)

    def finish() -> None:
        writer.finish()
        folder.commit(path, text, manifest["arrays"])

    pool = concurrent.futures.ThreadPoolExecutor(1, thread_name_prefix="save")
    future = pool.submit(finish)
    pool.shutdown(wait=False)
    return future


def load(
    path: epath.PathLike,
    model: nnx.Module | None = None,
    mesh: jax.sharding.Mesh | None = None,
    *,
    verify: bool = False,
) -> nnx.Module:
    """Reads a model; a packed one never has its dense kernels made.

    Args:
        path: Folder that `save` wrote.
        model: For a model of no registered family: its float self, abstract (`nnx.eval_shape`) or
            not; only its structure is used.
        mesh: Where the arrays go, by the model's sharding table, whatever devices wrote them; each
            process reads what its devices need. Default: one device.
        verify: Whether the digest of every array is checked, at about 1.5 GB a second and core.

    Raises:
        ValueError: No checkpoint, an unknown schema, layout or family, arrays that do not belong to
            the manifest or (`verify`) have another content, a tokenizer with tokens that the model
            has no embedding for.
    """
    path = located(path)
    manifest = read_manifest(path)
    if verify and manifest["schema"] == 1:
        raise NotImplementedError(
            f"{path}: schema 1 kept no digests, so there is nothing to verify. Load it without "
            "verify, and save it again."
        )
    check_tokenizer(path, manifest)
    where = path / manifest["arrays"]
    if manifest["schema"] == 1:
        graphdef, state = structure(path, manifest, model)
        tree = arrays.read_schema_1(where, _placed(trees.to_tree(state), mesh))
    else:
        target = _placed(_planned(path, manifest), mesh)
        # The disk is read while the model's structure is traced, which takes about as long.
        with arrays.reading(where, target, hashed=verify) as finish:
            graphdef, state = structure(path, manifest, model)
            tree, found = finish()
    restored = trees.from_tree(tree, state)
    if verify and (wrong := differing(manifest["tensors"], _sums(manifest, found, restored))):
        raise ValueError(
            f"{path}: the content of {len(wrong)} arrays is not what was saved (their SHA-256 "
            f"differs): {', '.join(wrong[:3])}. The files are damaged or were exchanged; restore "
            "the folder from a copy."
        )
    return nnx.merge(graphdef, restored)


def _manifest(model: nnx.Module, state: nnx.State) -> dict[str, Any]:
    """What the manifest says of the model itself, without the digests."""
    family, config = family_of(model) if _registered(model) else (None, None)
    recipe = recipe_of(model)
    return {
        "schema": SCHEMA,
        "library": f"lowbit_jax {version.__version__}",
        "family": family,
        "config": config,
        "kind": kind_of(model),
        "recipe": None if recipe is None else json.loads(recipe.to_json()),
        "tensors": trees.describe(state),
    }


def _sums(manifest: dict[str, Any], found: dict[str, Any], state: nnx.State) -> Digests:
    """The digests of what was read: those made on the way, where this process read all of it."""
    if jax.process_count() > 1 or None in jax.tree.leaves(found, is_leaf=lambda x: x is None):
        return digests(state)
    sums: Digests = {}
    for name in manifest["tensors"]:
        of_tensor = functools.reduce(operator.getitem, name.split("/"), found)
        flat = isinstance(of_tensor, dict)
        sums[name] = dict(trees.flat_parts(of_tensor)) if flat else of_tensor
    return sums


def _planned(path: epath.Path, manifest: dict[str, Any]) -> dict[str, Any]:
    """The arrays that the manifest lists, or an error that names it."""
    try:
        return planned(manifest["tensors"])
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error


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


def _registered(model: nnx.Module) -> bool:
    try:
        family_of(model)
    except ValueError:
        return False
    return True
