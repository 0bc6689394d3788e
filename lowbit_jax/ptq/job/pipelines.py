"""From a config to recipe and pipeline: every stage under the name of its field."""

import dataclasses
from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Any, Final

import lowbit_jax as lb
from lowbit_jax import ptq
from lowbit_jax.ptq.job.config import QuantizeConfig
from lowbit_jax.ptq.job.options import AutoRoundConfig, EndToEndConfig, OmniQuantConfig
from lowbit_jax.training.fields import nearest


def _omniquant(options: OmniQuantConfig) -> ptq.Stage:
    equivalence = None
    if options.equivalence:
        links: Any = options.equivalence_links  # checked by the stage
        equivalence = ptq.Equivalence(options.equivalence_lr, options.equivalence_alpha, links)
    return ptq.OmniQuant(options.steps, options.batch, options.lr, equivalence)


def _end_to_end(options: EndToEndConfig, first: int | None) -> ptq.Stage:
    rounding: tuple[ptq.Variable, ...] = ()
    if options.rounding_lr:
        rounding = (ptq.RoundingOffset(options.rounding_lr, options.rounding_limit),)
    return ptq.EndToEnd(
        (*rounding, ptq.Scales(options.lr)),
        (ptq.Norms(options.norms_lr),),
        steps=options.steps,
        batch=options.batch,
        written=ptq.Written(options.written, first),
    )


# Made from their options by name.
PLAIN: Final[Mapping[str, Callable[..., ptq.Stage | tuple[ptq.Stage, ...]]]] = MappingProxyType(
    {
        "adaround": ptq.AdaRound,
        "awq_clip": ptq.AWQClip,
        "awq_scale": ptq.AWQScale,
        "brecq": ptq.BRECQ,
        "efficientqat": ptq.EfficientQAT,
        "equalization": ptq.CrossLayerEqualization,
        "gptq": ptq.GPTQ,
        "hqq": ptq.HQQ,
        "outlier_suppression": ptq.OutlierSuppression,
        "qdrop": ptq.QDrop,
        "rotate": ptq.Rotate,
        "rtn": ptq.RoundToNearest,
        "smoothquant": ptq.SmoothQuant,
    }
)
STAGES: Final = (*PLAIN, "autoround", "end_to_end", "omniquant")


def make_pipeline(config: QuantizeConfig, first: int | None = None) -> list[ptq.Stage]:
    """The stages of a config, with its options.

    Args:
        config: The run.
        first: The tokenizer's begin token, if it has one.

    Raises: ValueError: No stage, an unknown one (the message lists the nearest), one named twice,
        or an option that its stage refuses.
    """
    stages: list[ptq.Stage] = []
    for name in stage_names(config):
        made = _make(name, config, first)
        stages += made if isinstance(made, tuple) else (made,)
    return stages


def _make(
    name: str, config: QuantizeConfig, first: int | None
) -> ptq.Stage | tuple[ptq.Stage, ...]:
    if name not in STAGES:
        raise ValueError(
            f"pipeline={config.pipeline!r}: there is no stage {name!r}. Stages, nearest first: "
            f"{', '.join(nearest(name, sorted(STAGES)))}."
        )
    if name == "autoround":
        options: AutoRoundConfig = config.autoround
        return ptq.AutoRound(options.steps, options.batch, options.bits or _fewest_bits(config))
    if name == "omniquant":
        return _omniquant(config.omniquant)
    if name == "end_to_end":
        return _end_to_end(config.end_to_end, first)
    return PLAIN[name](**dataclasses.asdict(getattr(config, name)))


def _fewest_bits(config: QuantizeConfig) -> int:
    schemes = [rule.resolved for rule in make_recipe(config).rules]
    weights = [scheme.weight for scheme in schemes if scheme is not None]
    return min((weight.spec.bits for weight in weights if weight is not None), default=8)


def stage_names(config: QuantizeConfig) -> list[str]:
    """The names of the pipeline's stages, in order.

    Raises: ValueError: None, or one twice, which could not have two sets of options.
    """
    names = [name.strip() for name in config.pipeline.split(",") if name.strip()]
    if not names or len(set(names)) < len(names):
        raise ValueError(
            f"pipeline={config.pipeline!r} has to name at least one stage, and each once. Stages: "
            f"{', '.join(sorted(STAGES))}."
        )
    return names


def make_recipe(config: QuantizeConfig) -> lb.Recipe:
    """The rules of a config, or its scheme for every layer.

    Raises: ValueError: Neither, an unknown preset (the message lists the nearest), a bad pattern.
    """
    if config.rules.strip():
        found = lb.Recipe.from_string(config.rules)
        return found if isinstance(found, lb.Recipe) else lb.Recipe(lb.Rule(".*", config.rules))
    if not config.scheme.strip():
        raise ValueError(
            "scheme and rules are both empty: nothing says how to quantize. Give "
            "--config.scheme=w4a16_asym."
        )
    return lb.Recipe(lb.Rule(".*", config.scheme.strip()))


def describe_scheme(config: QuantizeConfig) -> str:
    """The scheme as tables show it."""
    return config.rules.strip() or config.scheme.strip()


def describe_method(config: QuantizeConfig) -> str:
    """The pipeline as tables show it, with options that differ from their stage's defaults."""
    parts = []
    for name in stage_names(config):
        options = getattr(config, name)
        values, usual = dataclasses.asdict(options), dataclasses.asdict(type(options)())
        changed: list[Any] = [f"{k}={v}" for k, v in values.items() if v != usual[k]]
        parts.append(f"{name}({', '.join(changed)})" if changed else name)
    return " + ".join(parts)
