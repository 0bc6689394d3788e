"""Training of image classifiers with batch norms, from a model that fits in memory.

Language models have their own loop (`loop`), with checkpoints inside a run. Here a run takes
minutes: it is a function of (model, data, config, seed) and is started anew when it is lost.
"""

import dataclasses
import functools
import math
import time
from collections.abc import Callable
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from jaxtyping import Array, Float, Int, Int32, UInt8

from lowbit_jax.data.images import LabelledImages
from lowbit_jax.optimizers import clip_latent
from lowbit_jax.optimizers.kernels import path_name
from lowbit_jax.training.optimizer import decay_mask
from lowbit_jax.training.step import observed

Forward = Callable[[Any, Array], Array]
"""(model, images as `pixels` gives them) -> scores of the classes."""

_EVAL_BATCH = 1000


@dataclasses.dataclass(frozen=True, kw_only=True)
class ClassifierConfig:
    """How a classifier is trained; the loss is `squared_hinge`.

    Attributes:
        epochs: Passes over the training images.
        batch: Images in a step; the last ones of an epoch that fill no batch are left out.
        optimizer: "adam", or "sgd" with a momentum of 0.9.
        lr: Learning rate of the first step.
        final_lr: Of the last step; the decay is exponential. None: `drops` instead.
        drops: Shares of the run behind which the rate is a tenth of what it was.
        weight_decay: Of kernels, added to their gradients.
        glorot_lr: Updates of kernels are multiplied by sqrt((inputs + outputs) / 1.5), the inverse
            of Glorot's initial range (section 2.5 of arXiv:1511.00363): latent weights of binary
            layers range over [-1, 1], whatever the layer's width.
        clip: Largest magnitude of the latent weights of `quantizers.Sign`; None: they are free.
        validation: Images at the end of the training images that choose the best epoch, and are not
            trained on. 0: the last epoch is taken.
    Raises: ValueError: a number that makes no run.
    """

    epochs: int
    batch: int
    optimizer: Literal["adam", "sgd"]
    lr: float
    final_lr: float | None = None
    drops: tuple[float, ...] = ()
    weight_decay: float = 0.0
    glorot_lr: bool = False
    clip: float | None = None
    validation: int = 0

    def __post_init__(self):
        if min(self.epochs, self.batch) < 1 or self.validation < 0:
            raise ValueError(
                f"ClassifierConfig: epochs={self.epochs} and batch={self.batch} must be at least "
                f"1, and validation={self.validation} at least 0."
            )
        rates = [self.lr] if self.final_lr is None else [self.lr, self.final_lr]
        if not all(0 < rate < math.inf for rate in rates):
            raise ValueError(f"ClassifierConfig: learning rates {rates} must be numbers > 0.")
        if self.optimizer not in ("adam", "sgd"):
            raise ValueError(
                f"ClassifierConfig: optimizer={self.optimizer!r} is not of ['adam', 'sgd']."
            )


class Epoch(NamedTuple):
    """What is known behind an epoch: its mean loss, and the error in percent (NaN if none)."""

    number: int
    loss: float
    validation_error: float
    seconds: float


class Trained(NamedTuple):
    """The model of the chosen epoch, in evaluation, and the history of all."""

    model: nnx.Module
    best: int
    history: list[Epoch]


def squared_hinge(
    scores: Float[Array, "batch classes"], labels: Int[Array, " batch"]
) -> Float[Array, ""]:
    """L2-SVM's loss, one class against the rest: mean over images of sum max(0, 1 - t s)^2.

    t is 1 for an image's own class and -1 for the others (arXiv:1306.0239).
    """
    targets = 2.0 * jax.nn.one_hot(labels, scores.shape[-1], dtype=scores.dtype) - 1.0
    return jnp.mean(jnp.sum(jnp.square(jnp.maximum(0.0, 1.0 - targets * scores)), axis=-1))


def pixels(images: UInt8[Array, "*shape"]) -> Float[Array, "*shape"]:
    """Bytes as numbers in [-1, 1]."""
    return images.astype(jnp.float32) * np.float32(2 / 255) - 1.0


def classes(
    model: nnx.Module, forward: Forward, images: UInt8[np.ndarray, "n height width channels"]
) -> Int32[np.ndarray, " n"]:
    """The class with the largest score for every image; norms use their running statistics."""
    model.eval()
    graphdef, state = nnx.split(model)
    starts = range(0, len(images), _EVAL_BATCH)
    batches = (jnp.asarray(images[i : i + _EVAL_BATCH]) for i in starts)
    return np.concatenate([_classes(forward, graphdef, state, batch) for batch in batches])


def error(model: nnx.Module, forward: Forward, data: LabelledImages) -> float:
    """Images that get another class than their own, in percent."""
    return 100 * float(np.mean(classes(model, forward, data.images) != data.labels))


# Outside of `classes`, so that a graph that was seen before is not compiled again.
@functools.partial(jax.jit, static_argnums=(0, 1))
def _classes(forward: Forward, graphdef: Any, state: Any, images: Array) -> Array:
    scores = forward(nnx.merge(graphdef, state), pixels(images))
    return jnp.argmax(scores, axis=-1).astype(jnp.int32)


def make_optimizer(
    config: ClassifierConfig, model: nnx.Module, steps: int
) -> optax.GradientTransformation:
    """The optimizer of a run of that many steps."""
    schedule: optax.Schedule
    if config.final_lr is None:
        schedule = optax.piecewise_constant_schedule(
            config.lr, {round(share * steps): 0.1 for share in config.drops}
        )
    else:
        schedule = optax.exponential_decay(
            config.lr, max(steps - 1, 1), config.final_lr / config.lr
        )
    parts = []
    if config.weight_decay:
        parts.append(optax.add_decayed_weights(config.weight_decay, mask=decay_mask))
    parts.append(optax.scale_by_adam() if config.optimizer == "adam" else optax.trace(decay=0.9))
    parts.append(optax.scale_by_learning_rate(schedule))
    if config.glorot_lr:
        parts.append(optax.stateless(_scale_by_glorot))
    if config.clip is not None:
        parts.append(clip_latent(model, config.clip))
    return optax.chain(*parts)


def _scale_by_glorot(updates: Any, params: Any = None) -> Any:
    del params

    def scaled(path: Any, update: Array) -> Array:
        if path_name(path).rsplit("/", 1)[-1] != "kernel":
            return update
        window = math.prod(update.shape[:-2])
        connections = window * (update.shape[-2] + update.shape[-1])
        return update * np.float32(math.sqrt(connections / 1.5))

    return jax.tree_util.tree_map_with_path(scaled, updates)


def train_classifier(
    model: nnx.Module,
    forward: Forward,
    data: LabelledImages,
    config: ClassifierConfig,
    *,
    seed: int,
    on_epoch: Callable[[Epoch], None] | None = None,
) -> Trained:
    """Trains a copy of a model, float or quantized.

    Args:
        model: Left untouched.
        forward: How it is called.
        data: Training images; see `ClassifierConfig.validation`.
        config: How it is trained.
        seed: Of the images' order.
        on_epoch: Told of every epoch as it ends.
    Raises:
        ValueError: Too few images for a batch.
        FloatingPointError: The loss became NaN or infinite.
    """
    count = len(data) - config.validation
    train, valid = data[: max(count, 0)], data[max(count, 0) :]
    steps = len(train) // config.batch
    if not steps:
        raise ValueError(
            f"{len(data)} images without the {config.validation} for validation fill no batch of "
            f"{config.batch}. Give more images, or set batch or validation lower."
        )
    graphdef, params, rest = _split_for_training(model)
    optimizer = make_optimizer(config, model, steps * config.epochs)
    step = _make_step(graphdef, forward, optimizer)
    opt = optimizer.init(params)
    order = np.random.default_rng(seed)
    history: list[Epoch] = []
    best: tuple[float, int, nnx.Module] | None = None
    for number in range(1, config.epochs + 1):
        start, losses = time.perf_counter(), []
        rows = order.permutation(len(train))[: steps * config.batch].reshape(steps, -1)
        for row in rows:
            params, rest, opt, loss = step(params, rest, opt, train.images[row], train.labels[row])
            losses.append(loss)
        mean = float(np.mean(jax.device_get(losses)))
        if not math.isfinite(mean):
            raise FloatingPointError(
                f"epoch {number}: the mean loss is {mean}. A lower learning rate than "
                f"{config.lr:g} often helps."
            )
        # A copy, because the next step reuses these buffers.
        now = nnx.merge(graphdef, *jax.tree.map(jnp.copy, (params, rest)))
        wrong = error(now, forward, valid) if len(valid) else math.nan
        history.append(Epoch(number, mean, wrong, time.perf_counter() - start))
        if best is None or math.isnan(wrong) or wrong < best[0]:
            best = (wrong, number, now)
        if on_epoch is not None:
            on_epoch(history[-1])
    assert best is not None
    best[2].eval()
    return Trained(best[2], best[1], history)


def _split_for_training(model: nnx.Module) -> tuple[Any, Any, Any]:
    """`(graphdef, params, rest)` of a copy in training, whose buffers a step may reuse."""
    clone = nnx.clone(model)
    clone.train()
    graphdef, params, rest = nnx.split(clone, nnx.Param, ...)
    params, rest = jax.tree.map(jnp.copy, (params, rest))
    return graphdef, params, rest


def _make_step(
    graphdef: Any, forward: Forward, optimizer: optax.GradientTransformation
) -> Callable[..., tuple[Any, Any, Any, Array]]:
    """`step(params, rest, opt, images, labels) -> (params, rest, opt, loss)`, compiled."""

    def loss_of(params: Any, rest: Any, images: Array, labels: Array) -> Any:
        # A copy, because `rest` is no argument that JAX differentiates, and norms write to it.
        model = nnx.merge(graphdef, params, rest, copy=True)
        loss = squared_hinge(forward(model, pixels(images)), labels)
        return loss, nnx.split(model, nnx.Param, ...)[2]

    @functools.partial(jax.jit, donate_argnums=(0, 1, 2))
    def step(params: Any, rest: Any, opt: Any, images: Array, labels: Array) -> Any:
        (loss, rest), grads = jax.value_and_grad(loss_of, has_aux=True)(
            params, rest, images, labels
        )
        updates, opt = optimizer.update(grads, opt, params)
        params = optax.apply_updates(params, updates)
        return params, observed(graphdef, params, rest), opt, loss

    return step
