"""AdamW for latent weights and learned scales."""

from typing import Any

import jax
import optax

from lowbit_jax.optimizers.kernels import path_name
from lowbit_jax.training import schedule
from lowbit_jax.training.config import OptimConfig

# Learned ranges of activations. PACT's clip is not among them: its paper decays it like a weight.
_NOT_DECAYED = ("_offset", "_intervals", "_threshold")


def make_optimizer(config: OptimConfig, steps: int) -> optax.GradientTransformation:
    """Clipping by the global norm, then AdamW (arXiv:1711.05101) under the config's schedules.

    Weights of rank 2 and more decay; norms, biases and learned scales do not. Learned scales move
    with `scale_lr` times the learning rate: Adam's step does not depend on the gradient's size,
    and a scale is much smaller than the weights it was made for.
    """
    parts = [optax.clip_by_global_norm(config.clip)] if config.clip else []
    parts.append(
        optax.adamw(
            schedule.learning_rate(config, steps),
            b1=config.beta1,
            b2=config.beta2,
            eps=config.eps,
            weight_decay=schedule.weight_decay(config, steps),
            mask=decay_mask,
        )
    )
    if config.scale_lr != 1.0:
        parts.append(_scale_learned_scales(config.scale_lr))
    return optax.chain(*parts)


def is_learned_scale(path: tuple[Any, ...]) -> bool:
    """Whether the parameter is a quantizer's learned scale."""
    return path_name(path).endswith("_scale")


def decay_mask(params: Any) -> Any:
    """True for the leaves that weight decay acts on: kernels and embeddings.

    By name as well as by rank, because in a scanned stack a norm's scale is a matrix.
    """

    def decays(path: tuple[Any, ...], leaf: jax.Array) -> bool:
        name = path_name(path).rsplit("/", 1)[-1]
        learned = is_learned_scale(path) or name.endswith(_NOT_DECAYED)
        return leaf.ndim >= 2 and name not in ("scale", "bias") and not learned

    return jax.tree_util.tree_map_with_path(decays, params)


def _scale_learned_scales(factor: float) -> optax.GradientTransformation:
    def update(updates: Any, params: Any = None) -> Any:
        del params
        return jax.tree_util.tree_map_with_path(
            lambda path, leaf: leaf * factor if is_learned_scale(path) else leaf, updates
        )

    return optax.stateless(update)
