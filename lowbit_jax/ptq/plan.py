"""What is going to be quantized: the blocks, the layers in them, and how."""

import dataclasses
import difflib
import re
from collections.abc import Sequence
from typing import Any

from flax import nnx

from lowbit_jax.models.wiring import Wiring, wiring_of
from lowbit_jax.nn import TRAIN_TWINS, Twin
from lowbit_jax.presets import presets
from lowbit_jax.ptq.layers import get_matrix
from lowbit_jax.recipe import Recipe, Rule
from lowbit_jax.scheme import LayerScheme
from lowbit_jax.surgery import check_rules, is_candidate
from lowbit_jax.walk import layers


@dataclasses.dataclass(frozen=True)
class Plan:
    """What is going to be quantized.

    Attributes:
        blocks: Paths of the blocks, in the model's order.
        schemes: How each layer is quantized, by path in the model.
        wiring: Which layer feeds which, or None.
    """

    blocks: tuple[str, ...]
    schemes: dict[str, LayerScheme]
    wiring: Wiring | None

    def inside(self, block: str) -> dict[str, LayerScheme]:
        """The schemes of one block's layers, by path in the block."""
        prefix = f"{block}/"
        return {
            path.removeprefix(prefix): scheme
            for path, scheme in self.schemes.items()
            if path.startswith(prefix)
        }

    def outside(self) -> dict[str, LayerScheme]:
        """The schemes of layers that are in no block."""
        prefixes = tuple(f"{block}/" for block in self.blocks)
        return {p: scheme for p, scheme in self.schemes.items() if not p.startswith(prefixes)}


def make_plan(
    model: nnx.Module,
    recipe: Recipe | str,
    blocks: str,
    include: Sequence[str] = (),
    wiring: Wiring | None = None,
) -> Plan:
    """Finds blocks and layers, and checks everything that can be checked before any work.

    Args:
        model: A float model.
        recipe: Rules, or a preset's name for all layers of the blocks (and those included).
        blocks: Pattern that matches the whole path of every block.
        include: Paths of layers outside the blocks over which the recipe ranges too.
        wiring: Of the user's own model; default: that of a model of this library.

    Raises:
        ValueError: No block or layer, a rule without layers, a length that does not split into
            groups, a model that is quantized already, blocks inside blocks.
        NotImplementedError: A layer without a twin, a block that is itself a layer.
    """
    modules = dict(layers(model))
    if twins := [path for path, module in modules.items() if isinstance(module, Twin)]:
        raise ValueError(f"{twins[0]}: is quantized already. Start from the float model.")
    names = _blocks(modules, blocks)
    prefixes = tuple(f"{name}/" for name in names)
    found = {
        path: module
        for path, module in modules.items()
        if is_candidate(module) and (path.startswith(prefixes) or path in (*include, *names))
    }
    for path in include:
        if path not in found:
            near = difflib.get_close_matches(path, modules, n=4, cutoff=0.0)
            raise ValueError(f"include={path!r}: no layer with a weight is there. Nearest: {near}.")
    if not found:
        raise ValueError(
            f"the blocks {names[0]} .. {names[-1]} hold no layer with a weight matrix."
        )
    if isinstance(recipe, str):
        recipe = Recipe(Rule(".*", presets[recipe]))
    chosen = {path: recipe.find(path) for path in found}
    check_rules(recipe, found, chosen)
    schemes = {}
    for path, rule in chosen.items():
        if rule is not None and rule.resolved is not None:
            _check_layer(path, found[path], rule.resolved)
            if path in names:
                raise NotImplementedError(
                    f"blocks={blocks!r}: {path} is a {type(found[path]).__name__} itself; a block "
                    "is a module that holds layers. Match the module around it or wrap it in one, "
                    f"or leave it float with a rule in front: Rule({re.escape(path)!r}, None)."
                )
            schemes[path] = rule.resolved
    if not schemes:
        raise ValueError("the recipe leaves every layer of the blocks float: nothing to do.")
    return Plan(names, schemes, wiring or wiring_of(model))


def _blocks(modules: dict[str, Any], pattern: str) -> tuple[str, ...]:
    try:
        names = tuple(path for path in modules if re.fullmatch(pattern, path))
    except re.error as error:
        raise ValueError(f"blocks={pattern!r} is no regular expression: {error}.") from None
    if not names:
        near = difflib.get_close_matches(pattern, modules, n=5, cutoff=0.0)
        stacked = getattr(getattr(modules.get(""), "config", None), "stacked", False)
        hint = (
            " The model's layers are stacked in one scan; build it with stacked=False."
            if stacked
            else ""
        )
        raise ValueError(f"blocks={pattern!r} matches no module. Nearest paths: {near}.{hint}")
    for outer in names:
        if inner := [name for name in names if name.startswith(f"{outer}/")]:
            raise ValueError(f"blocks={pattern!r}: {inner[0]} lies inside {outer}. Match one kind.")
    return names


def _check_layer(path: str, layer: nnx.Module, scheme: LayerScheme) -> None:
    if type(layer) not in TRAIN_TWINS:
        raise NotImplementedError(
            f"{path}: a {type(layer).__name__} has no quantized twin; those with one: "
            f"{sorted(c.__name__ for c in TRAIN_TWINS)}. Leave it float with a rule in front: "
            f"Rule({re.escape(path)!r}, None)."
        )
    if scheme.hadamard or scheme.backward != "float":
        raise NotImplementedError(
            f"{path}: a scheme that is {scheme.describe()} is trained; after training, rotations "
            "are a transform of the model: ptq.Rotate."
        )
    if scheme.weight is not None and scheme.weight.learns_values:
        raise NotImplementedError(
            f"{path}: {type(scheme.weight).__name__} learns the values of its format; solvers "
            "choose codes for constant ones. Train it, or use a preset such as w2a16 or w1_58a16."
        )
    if scheme.weight is not None:
        try:
            scheme.weight.spec.scale_shape(get_matrix(layer).shape)
        except ValueError as error:
            raise ValueError(f"{path}: {error}") from None
