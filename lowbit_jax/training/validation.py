"""Refusing configs that cannot train, before any text is read and anything is written."""

import dataclasses

from lowbit_jax.models import DecoderConfig
from lowbit_jax.training.config import TrainConfig

SCHEDULES = ("cosine", "two_stage", "constant")


def validate(config: TrainConfig) -> None:
    """Refuses values that cannot train, before anything is written.

    Raises: ValueError: with every wrong field on its own line.
    """
    optim, distill = config.optim, config.distill
    positive = (
        "steps",
        "batch",
        "length",
        "accumulate",
        "log_every",
        "eval_every",
        "eval_batches",
        "checkpoint_every",
        "calibrate_every",
    )
    checks = [(getattr(config, f) > 0, f"{f}={getattr(config, f)}: must be > 0") for f in positive]
    checks.append(_check_model(config))
    checks += [
        (
            optim.schedule in SCHEDULES,
            f"optim.schedule={optim.schedule!r}: one of {', '.join(SCHEDULES)}",
        ),
        (optim.lr > 0, f"optim.lr={optim.lr}: must be > 0"),
        (
            0 <= optim.warmup < max(config.steps, 1),
            f"optim.warmup={optim.warmup}: must be in [0, steps), and steps={config.steps}",
        ),
        (optim.clip >= 0, f"optim.clip={optim.clip}: must be >= 0 (0: no clipping)"),
        (
            config.length <= config.model.max_length,
            f"length={config.length}: longer than the model's context, "
            f"model.max_length={config.model.max_length}",
        ),
        (
            config.accumulate < 1 or config.batch % config.accumulate == 0,
            f"batch={config.batch}: does not split into accumulate={config.accumulate} parts",
        ),
        (
            0 < config.data.valid_fraction < 1,
            f"data.valid_fraction={config.data.valid_fraction}: must be in (0, 1)",
        ),
        (config.final_batches >= 0, f"final_batches={config.final_batches}: must be >= 0"),
        (config.sample_length >= 0, f"sample_length={config.sample_length}: must be >= 0"),
        (distill.temperature > 0, f"distill.temperature={distill.temperature}: must be > 0"),
        (0 <= distill.weight <= 1, f"distill.weight={distill.weight}: must be in [0, 1]"),
    ]
    if wrong := [message for fine, message in checks if not fine]:
        raise ValueError("config: " + "\n  ".join(wrong))


def decoder_config(config: TrainConfig, vocab: int) -> DecoderConfig:
    """The model's own configuration. Raises: ValueError: sizes that no model can have."""
    sizes = dataclasses.asdict(config.model)
    sizes["head_dim"] = sizes["head_dim"] or None
    return DecoderConfig(vocab=vocab, dtype=config.dtype, **sizes)


def _check_model(config: TrainConfig) -> tuple[bool, str]:
    try:
        decoder_config(config, vocab=1)
    except ValueError as error:
        return False, f"model: {error}"
    return True, ""
