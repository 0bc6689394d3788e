"""What quantization-aware training costs: one train step, quantized over float, in one run.

The model has about 4 M parameters; a step is loss, gradients and AdamW on 16 x 256 tokens. Every
scheme is first
checked: its packed model must give the loss of the quantized one. The peer is qwix, when it is
installed; it quantizes the same layers (all linear layers but the head) with absmax scales.
"""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

import lowbit_jax as lb
from experiments.benchmarks.timing import Timing, interleaved
from lowbit_jax.evaluation.losses import cross_entropy
from lowbit_jax.models import Decoder, DecoderConfig
from lowbit_jax.training.config import OptimConfig
from lowbit_jax.training.optimizer import make_optimizer
from lowbit_jax.training.step import make_train_step, split

SCHEMES = (
    "w4a16", "w4a16_g32", "w4a16_lsq", "w4a16_g32_lsq", "w1_58a8", "w1_58a8_int8",
)  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Sizes:
    """Of the model and the batch."""

    dim: int = 256
    layers: int = 5
    ffn_dim: int = 704
    batch: int = 16
    length: int = 256

    def model(self) -> Decoder:
        """A float decoder over bytes."""
        config = DecoderConfig(
            vocab=256, dim=self.dim, layers=self.layers, heads=4, kv_heads=4,
            ffn_dim=self.ffn_dim, max_length=self.length,
        )  # fmt: skip
        return Decoder(config, rngs=nnx.Rngs(0))


def measure(sizes: Sizes, *, rounds: int, schemes: tuple[str, ...] = SCHEMES) -> list[Timing]:
    """Checks every scheme, then times interleaved train steps; the first row is the float model."""
    fresh = np.random.default_rng().integers(0, 256, (sizes.batch, sizes.length + 1))
    tokens = jnp.asarray(fresh, jnp.int32)
    model = sizes.model()
    models: dict[str, nnx.Module] = {"float": model}
    for scheme in schemes:
        models[scheme] = lb.quantize_model(model, scheme)
        check(models[scheme], scheme, tokens)
    models |= peers(model, tokens)
    steps = {name: stepper(quantized, tokens) for name, quantized in models.items()}
    for step in steps.values():
        jax.block_until_ready(step())
    return interleaved(steps, rounds=rounds, baseline="float")


def stepper(model: nnx.Module, tokens: jax.Array) -> Callable[[], Any]:
    """A function that takes one train step from where the last one ended."""
    optimizer = make_optimizer(OptimConfig(), steps=10_000)
    graphdef, state = split(model, optimizer)
    state = jax.tree.map(jnp.copy, state)  # the step donates its state, and models share arrays
    step = make_train_step(graphdef, optimizer)
    holder = [state]

    def run() -> Any:
        holder[0], metrics = step(holder[0], tokens)
        return holder[0], metrics

    return run


def check(model: nnx.Module, name: str, tokens: jax.Array) -> None:
    """Raises unless the packed model gives the loss of the quantized one, to 1e-5 nats."""
    trained, packed = loss(model, tokens), loss(lb.pack_model(model), tokens)
    if not abs(trained - packed) <= 1e-5:
        raise AssertionError(f"{name}: packed loss {packed} is not the quantized loss {trained}.")


def loss(model: nnx.Module, tokens: jax.Array) -> float:
    """Loss of a model on the first row, in nats per token."""
    graphdef, state = nnx.split(model)
    run = jax.jit(lambda s, t: cross_entropy(nnx.merge(graphdef, s)(t[:, :-1]), t[:, 1:]))
    return float(run(state, tokens[:1]))


def peers(model: nnx.Module, tokens: jax.Array) -> dict[str, nnx.Module]:
    """qwix's QAT of the same layers, if it is installed; raises if it left the model float."""
    try:
        import qwix
    except ImportError:
        return {}
    pattern = r"layers/.*"
    rules: dict[str, dict[str, Any]] = {
        "qwix int4": {"weight_qtype": "int4"},
        "qwix int4, groups of 32": {"weight_qtype": "int4", "tile_size": 32},
        "qwix int4, int8 activations": {"weight_qtype": "int4", "act_qtype": "int8"},
    }
    models = {}
    for name, rule in rules.items():
        provider = qwix.QtProvider([qwix.QtRule(module_path=pattern, **rule)])
        models[name] = qwix.quantize_model(model, provider, tokens[:, :-1])
        if loss(models[name], tokens) == loss(model, tokens):
            raise AssertionError(
                f"{name}: the loss is that of the float model; nothing is quantized."
            )
    return models


def table(timings: list[Timing], sizes: Sizes) -> str:
    """The result as Markdown."""
    parameters = sum(leaf.size for leaf in jax.tree.leaves(nnx.state(sizes.model(), nnx.Param)))
    lines = [
        f"Train step, {parameters:,} parameters, {sizes.batch} x {sizes.length} tokens, "
        f"{len(timings[0].seconds)} interleaved rounds, jax {jax.__version__}, "
        f"{jax.device_count()} x {jax.devices()[0].device_kind}.",
        "",
        "| scheme | ms (median) | ratio to float | 25 % .. 75 % |",
        "|---|---|---|---|",
    ]
    lines += [
        f"| {t.name} | {t.median * 1e3:.1f} | {t.ratio:.3f} | {t.ratio_low:.3f} .. "
        f"{t.ratio_high:.3f} |"
        for t in timings
    ]
    return "\n".join(lines)
