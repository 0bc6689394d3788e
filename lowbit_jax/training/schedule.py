"""Learning rate and weight decay as functions of the step."""

import optax

from lowbit_jax.training.config import OptimConfig


def learning_rate(config: OptimConfig, steps: int) -> optax.Schedule:
    """Linear warm-up from `lr / warmup`, then what `config.schedule` names.

    "cosine" falls to `final_lr` of the peak at the last step; "constant" stays at the peak.
    "two_stage" is the cosine, multiplied by `stage2_lr` from the middle of the run on: the idea of
    the training recipe of BitNet b1.58 (arXiv:2402.17764 and its follow-up notes), where latent
    weights want a high rate first and then a sudden drop. Deviation: the two stages share one
    envelope, and the drop's size is a field, because the notes give it per model size.
    """
    if config.schedule == "constant":
        envelope: optax.Schedule = optax.constant_schedule(config.lr)
    else:
        envelope = optax.cosine_decay_schedule(
            config.lr, max(steps - config.warmup, 1), alpha=config.final_lr
        )
    if config.schedule == "two_stage":
        envelope = _drop(envelope, config.stage2_lr, steps // 2 - config.warmup)
    if not config.warmup:
        return envelope
    warmup = optax.linear_schedule(config.lr / config.warmup, config.lr, config.warmup)
    return optax.join_schedules([warmup, envelope], [config.warmup])


def weight_decay(config: OptimConfig, steps: int) -> optax.Schedule:
    """Constant; under "two_stage" multiplied by `stage2_decay` from the middle of the run on.

    Decay pulls latent weights towards zero, where their codes flip most easily; the second half is
    for the codes to settle.
    """
    constant = optax.constant_schedule(config.weight_decay)
    if config.schedule == "two_stage":
        return _drop(constant, config.stage2_decay, steps // 2)
    return constant


def _drop(schedule: optax.Schedule, factor: float, at: int) -> optax.Schedule:
    gate = optax.piecewise_constant_schedule(1.0, {max(at, 0): factor})
    return lambda count: schedule(count) * gate(count)
