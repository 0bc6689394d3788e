"""How variables are stepped: a frozen description, from which optax makes the transformation."""

import dataclasses
from collections.abc import Mapping
from typing import Any, Final, Literal

import optax


@dataclasses.dataclass(frozen=True)
class Optimizer:
    """Adam or signed gradients, with a schedule that multiplies every learning rate.

    Attributes:
        method: "adam", or "sign": steps of the gradient's sign (SignSGD, as in AutoRound).
        decay: Of the learning rates over the steps: "constant", "linear" to zero, or "cosine" to
            zero.
        warmup: Share of the steps over which they rise from zero.
        clip: Largest global norm of the gradient; None: any.
        b2: Adam's second decay.
    """

    method: Literal["adam", "sign"] = "adam"
    decay: Literal["constant", "linear", "cosine"] = "constant"
    warmup: float = 0.0
    clip: float | None = None
    b2: float = 0.999

    def __post_init__(self):
        if self.method not in ("adam", "sign"):
            raise ValueError(f"Optimizer: method={self.method!r} is not of adam, sign.")
        if self.decay not in ("constant", "linear", "cosine"):
            raise ValueError(f"Optimizer: decay={self.decay!r} is not of constant, linear, cosine.")
        if not 0 <= self.warmup < 1:
            raise ValueError(f"Optimizer: warmup={self.warmup} is not in [0, 1).")

    def build(self, steps: int, rates: Mapping[str, float], labels: Any) -> Any:
        """The transformation.

        Args:
            steps: How many there will be.
            rates: Learning rate of each label.
            labels: A label for every parameter, as a pytree like them.
        """
        parts = {label: self._single(steps, rate) for label, rate in rates.items()}
        multi = optax.multi_transform(parts, labels)
        if self.clip is None:
            return multi
        return optax.chain(optax.clip_by_global_norm(self.clip), multi)

    def _single(self, steps: int, rate: float) -> Any:
        warmup = round(steps * self.warmup)
        left = max(steps - warmup, 1)
        decays = {
            "constant": lambda: optax.constant_schedule(rate),
            "linear": lambda: optax.linear_schedule(rate, 0.0, left),
            "cosine": lambda: optax.cosine_decay_schedule(rate, left),
        }
        schedule = decays[self.decay]()
        if warmup:
            rising = optax.linear_schedule(rate / warmup, rate, warmup)
            schedule = optax.join_schedules([rising, schedule], [warmup])
        return (
            optax.adam(schedule, b2=self.b2) if self.method == "adam" else optax.sign_sgd(schedule)
        )


ADAM: Final = Optimizer()
"""Adam at constant learning rates."""
