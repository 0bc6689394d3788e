"""Surgery: a model in, a new model out, with layers replaced by their twins.

Paths, parameter names and sharding metadata stay (but for packed kernels, which are no single
array any more); only `..._scale` and similar leaves are added. The argument is left untouched: the
new model has its own variables, which share the immutable arrays.
"""

import difflib
import functools
import re
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from lowbit_jax.nn import (
    PACKED_TWINS,
    TRAIN_TWINS,
    PackedTwin,
    QuantStat,
    TrainTwin,
    Twin,
    to_float,
)
from lowbit_jax.ops import Prepared, Target, prepare
from lowbit_jax.presets import presets
from lowbit_jax.quantizers import Quantizer
from lowbit_jax.recipe import Recipe, Rule
from lowbit_jax.scheme import LayerScheme
from lowbit_jax.walk import layers, rebuilt

NORMS = (nnx.BatchNorm, nnx.LayerNorm, nnx.RMSNorm, nnx.GroupNorm, nnx.InstanceNorm)
HEAD = re.compile(r"(.*/)?(lm_)?head")


def is_candidate(module: Any) -> bool:
    """Whether rules range over this module: no norm, with a parameter of rank >= 2, no bias."""
    if isinstance(module, NORMS):
        return False
    return isinstance(module, Twin) or any(
        isinstance(value, nnx.Param)
        and len(value.get_value().shape) >= 2
        and not name.endswith("bias")
        for name, value in vars(module).items()
    )


def is_embedding_or_head(path: str, module: Any) -> bool:
    """What a preset's name alone leaves float: embeddings, and layers named (lm_)head."""
    embedding = isinstance(module, nnx.Embed) or getattr(module, "float_class", None) is nnx.Embed
    return embedding or HEAD.fullmatch(path) is not None


def quantized_layers(model: nnx.Module) -> Iterator[tuple[str, Twin]]:
    """Every quantized layer with its path."""
    return ((path, module) for path, module in layers(model) if isinstance(module, Twin))


def recipe_of(model: nnx.Module) -> Recipe | None:
    """The recipe that quantizes the float model into this one; None if this is float."""
    paths: dict[LayerScheme, list[str]] = {}
    for path, twin in quantized_layers(model):
        paths.setdefault(twin.scheme, []).append(re.escape(path))
    if not paths:
        return None
    return Recipe(*(Rule("|".join(group), scheme) for scheme, group in paths.items()))


def quantize_model(model: nnx.Module, recipe: Recipe | str) -> nnx.Module:
    """A new model whose matched layers are quantized while they train.

    Args:
        model: Any NNX model; it is left untouched.
        recipe: Rules, or the name of a preset, which then means every candidate but embeddings and
            head.

    Returns: The model with `Q...` twins; parameter paths do not change.

    Raises:
        ValueError: A rule that matches nothing or is always shadowed, a model without candidates, a
            length that does not split into groups, a model that is quantized already: with the path
            and the fix.
        NotImplementedError: A matched layer that has no quantized twin.
    """
    schemes = chosen_schemes(model, recipe)

    def replace(path: str, module: Any) -> Any:
        return train_twin(path, module, schemes[path]) if path in schemes else module

    return rebuilt(model, replace)


def chosen_schemes(model: nnx.Module, recipe: Recipe | str) -> dict[str, LayerScheme]:
    """How `quantize_model` quantizes each layer, by path; raises what it raises of a recipe."""
    found = {path: module for path, module in layers(model) if is_candidate(module)}
    if twins := [path for path, module in found.items() if isinstance(module, Twin)]:
        raise ValueError(
            f"quantize_model: {twins[0]} and {len(twins) - 1} more layers are quantized already. "
            "Start from the float model."
        )
    if isinstance(recipe, str):
        recipe = _everything(found, recipe)
    rules = {path: recipe.find(path) for path in found}
    check_rules(recipe, found, rules)
    schemes = {}
    for path, rule in rules.items():
        scheme = None if rule is None else rule.resolved
        if rule is None or scheme is None:
            continue
        if type(found[path]) not in TRAIN_TWINS:
            raise NotImplementedError(
                f"{path}: a {type(found[path]).__name__} matched the rule {rule.path!r} but has no "
                f"quantized twin; those with one: {sorted(c.__name__ for c in TRAIN_TWINS)}. "
                f"Leave it float with a rule in front: Rule({re.escape(path)!r}, None)."
            )
        schemes[path] = scheme
    return schemes


def train_twin(path: str, module: Any, scheme: LayerScheme) -> TrainTwin:
    """A float layer's twin; raises what `quantize_model` raises of a single layer."""
    return _with_path(path, lambda: TRAIN_TWINS[type(module)](module, scheme))


def pack_model(model: nnx.Module) -> nnx.Module:
    """A new model whose quantized layers hold packed codes instead of float kernels.

    Paths and calls are the same: a packed kernel dequantizes to what training saw, bit for bit.
    Results differ by the order of float sums, since packed layers multiply through `ops.matmul`.

    Raises:
        ValueError: No layer is quantized, a kernel holds NaN or infinities, a statistic was never
            calibrated.
    """
    if not any(isinstance(module, TrainTwin) for _, module in layers(model)):
        raise ValueError(
            "pack_model: no layer of this model is quantized. Call quantize_model first."
        )

    return rebuilt(model, packed_twin)


def packed_twin(path: str, module: Any) -> Any:
    """What `pack_model` does with every module, for `rebuilt`; raises what it raises."""
    if not isinstance(module, TrainTwin):
        return module
    _check_values(path, module)
    if module.scheme.weight is None:
        return module
    return _with_path(path, lambda: PACKED_TWINS[type(module)](module))


def prepare_model(model: nnx.Module, target: Target = "auto") -> nnx.Module:
    """A new model whose packed layers hold their matrices in the order that a backend reads.

    Call it once, behind loading; the result multiplies, and is neither saved nor packed again.
    Layers that multiply another way (convolutions, stacks) and, with `target="auto"`, matrices that
    the backend has no kernel for stay as they are.

    Args:
        model: A packed model.
        target: See `prepare`.

    Raises:
        ValueError: No layer is packed.
        NotImplementedError: A named target has no kernels for a layer; the message has its path.
    """
    if not any(isinstance(module, PackedTwin) for _, module in layers(model)):
        raise ValueError("prepare_model: no layer of this model is packed. Call pack_model first.")

    def replace(path: str, module: Any) -> Any:
        operations = isinstance(module, PackedTwin) and module.multiplies_packed
        if not operations or isinstance(module.matrix, Prepared):
            return module
        matrix = _with_path(path, lambda: prepare(module.matrix, target))
        if matrix.meta.target == "xla":
            return module
        prepared = nnx.clone(module)
        setattr(prepared, module.kernel_name, module.kernel_variable.replace(matrix))
        return prepared

    return rebuilt(model, replace)


def dequantize_model(model: nnx.Module) -> nnx.Module:
    """A new float model with the values of the quantized kernels: plain Flax layers again.

    Quantizers of activations are dropped.
    """

    def replace(path: str, module: Any) -> Any:
        return to_float(module) if isinstance(module, Twin) else module

    return rebuilt(model, replace)


def calibrate_model(
    model: nnx.Module,
    batches: Iterable[Any],
    forward: Callable[[nnx.Module, Any], Any] | None = None,
    *,
    start: bool = True,
) -> nnx.Module:
    """Updates the statistics of activations (`QuantStat`) in place, from forward passes.

    Args:
        model: A quantized model; one without statistics is returned as it is.
        batches: What `forward` takes.
        forward: Runs the model on a batch; default `model(batch)`.
        start: Also sets the trainable ranges that need activations to start from (LSQ+, N2UQ).
            False while they train: a later calibration leaves them alone.

    Returns: The same model.

    Raises:
        ValueError: The model has statistics, and there was no batch to see.
    """
    twins = [twin for _, twin in quantized_layers(model)]
    seen = nnx.Any(QuantStat, Starting(model)) if start else QuantStat
    if not jax.tree.leaves(nnx.state(model, seen)):
        return model
    for twin in twins:
        twin.calibrating = True
    try:
        graphdef, stats, rest = nnx.split(model, seen, ...)
        count = 0
        for batch in batches:
            stats = _observed(forward or _call, graphdef, seen, stats, rest, batch)
            count += 1
        nnx.update(model, stats)
    finally:
        for twin in twins:
            twin.calibrating = False
    if not count:
        raise ValueError(
            "calibrate_model: there was no batch, so nothing was seen. Pass at least one."
        )
    return model


def has_kernel_statistics(model: nnx.Module) -> bool:
    """Whether a kernel's quantizer follows its weights by statistics (LQ-Nets)."""
    return any(_observes(twin) for _, twin in quantized_layers(model))


def observe_kernels(model: nnx.Module) -> nnx.Module:
    """Updates the statistics of kernels in place: behind every update of the weights.

    A quantizer whose values follow the weights without a gradient (LQ-Nets) takes one step of its
    own rule. The training loops of `training` call it; a loop of one's own does so behind its
    optimizer. Models without such quantizers stay as they are.

    Returns: The same model.
    """
    for _, twin in quantized_layers(model):
        if not _observes(twin):
            continue
        quantizer = twin.scheme.weight
        assert quantizer is not None
        matrix = twin.view.to_matrix(twin.kernel_variable[...])
        for name, value in quantizer.observe(matrix, twin.state("kernel")).items():
            if name not in quantizer.trainable:
                getattr(twin, f"kernel_{name}")[...] = value
    return model


def _observes(twin: Twin) -> bool:
    quantizer = twin.scheme.weight
    return isinstance(twin, TrainTwin) and isinstance(quantizer, Quantizer) and quantizer.observes


class Starting:
    """The filter of NNX for trainable ranges of activations that calibration starts."""

    def __init__(self, model: nnx.Module):
        """Takes a quantized model; without such ranges the filter lets nothing through."""
        self._paths = frozenset(
            (*path.split("/"), f"{part}_{name}") if path else (f"{part}_{name}",)
            for path, twin in quantized_layers(model)
            for part in ("input", "output")
            if (quantizer := getattr(twin.scheme, part)) is not None
            for name in quantizer.starts
        )

    def __call__(self, path: tuple[Any, ...], value: Any) -> bool:
        """Whether the variable at this path is one."""
        del value
        return tuple(map(str, path)) in self._paths

    def __bool__(self) -> bool:
        return bool(self._paths)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Starting) and self._paths == other._paths

    def __hash__(self) -> int:
        return hash(self._paths)


def _call(model: nnx.Module, batch: Any) -> Any:
    return model(batch)


# Outside of calibrate_model, so that a training loop that calibrates again does not compile again.
@functools.partial(jax.jit, static_argnums=(0, 1, 2))
def _observed(
    forward: Callable[[nnx.Module, Any], Any],
    graphdef: Any,
    seen: Any,
    stats: Any,
    rest: Any,
    batch: Any,
) -> Any:
    copy = nnx.merge(graphdef, stats, rest)
    forward(copy, batch)
    return nnx.state(copy, seen)


def _everything(found: dict[str, Any], preset: str) -> Recipe:
    scheme = presets[preset]
    paths = [path for path, module in found.items() if not is_embedding_or_head(path, module)]
    if not paths:
        raise ValueError(
            f"quantize_model: the preset {preset!r} means every layer but embeddings and head, and "
            f"this model has no other: {sorted(found) or 'no layer with a weight matrix'}. "
            "Give a Recipe."
        )
    return Recipe(Rule("|".join(map(re.escape, paths)), scheme))


def check_rules(recipe: Recipe, found: dict[str, Any], chosen: dict[str, Rule | None]) -> None:
    """Raises ValueError for a rule that matches no layer, or whose layers are all taken before it.

    Args:
        recipe: Whose rules are checked.
        found: The layers that rules range over, by path.
        chosen: The rule that decided for each of them.
    """
    used = {id(rule) for rule in chosen.values() if rule is not None}
    for rule in recipe.rules:
        if id(rule) in used:
            continue
        if shadowed := [path for path in found if rule.matches(path)]:
            first = chosen[shadowed[0]]
            assert first is not None
            raise ValueError(
                f"the rule {rule.path!r} never decides: every layer it matches is taken by an "
                f"earlier rule ({shadowed[0]} by {first.path!r}). Put the more special rule first, "
                "or remove one."
            )
        near = difflib.get_close_matches(rule.path, found, n=5, cutoff=0.0)
        raise ValueError(
            f"the rule {rule.path!r} matches no layer. Nearest paths: {near}. A pattern must match "
            "the whole path; lb.summary(model) prints all of them."
        )


def _check_values(path: str, module: TrainTwin) -> None:
    for name, variable in vars(module).items():
        if not isinstance(variable, nnx.Variable):
            continue
        for leaf in jax.tree.leaves(variable.get_value()):
            if (
                isinstance(leaf, jax.Array)
                and not isinstance(leaf, jax.core.Tracer)
                and jnp.issubdtype(leaf.dtype, jnp.floating)
                and not bool(_all_finite(leaf))
            ):
                if isinstance(variable, QuantStat):
                    raise ValueError(
                        f"{path}/{name}: this range was never calibrated (or saw NaN). "
                        "Run lb.calibrate_model(model, batches) before packing."
                    )
                bad = int(leaf.size - jnp.isfinite(leaf).sum())
                raise ValueError(f"{path}/{name}: {bad} of {leaf.size} values are NaN or infinite.")


@jax.jit
def _all_finite(x: jax.Array) -> jax.Array:
    return jnp.isfinite(x).all()


def _with_path(path: str, make: Callable[[], Any]) -> Any:
    try:
        return make()
    except (ValueError, NotImplementedError) as error:
        raise type(error)(f"{path}: {error}") from None
