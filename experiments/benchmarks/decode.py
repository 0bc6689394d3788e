"""Tokens a second of a whole model that writes one sequence: packed against dense float32.

A decoder of about 100 M parameters with random weights; each step writes tokens greedily from a
prompt of 16. The embedding is tied and packed with the rest. Checked first: the packed model's
logits against those of the model that it was packed from.
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
from lowbit_jax.generation import generate
from lowbit_jax.models import Decoder, DecoderConfig

DENSE = "float32"


@dataclasses.dataclass(frozen=True)
class Sizes:
    """Of the model and of one measurement."""

    dim: int = 768
    layers: int = 12
    heads: int = 12
    ffn_dim: int = 2048
    vocab: int = 20_480
    prompt: int = 16
    tokens: int = 128

    def model(self) -> Decoder:
        """A float decoder with random weights."""
        config = DecoderConfig(
            vocab=self.vocab, dim=self.dim, layers=self.layers, heads=self.heads,
            kv_heads=self.heads, ffn_dim=self.ffn_dim, max_length=256, tied=True,
        )  # fmt: skip
        return Decoder(config, rngs=nnx.Rngs(0))


def schemes() -> dict[str, lb.LayerScheme]:
    """What the model is packed with; everything, the embedding too."""
    w4 = lb.presets["w4a16_g128"].weight
    return {
        "W4A8, groups of 128": lb.LayerScheme(weight=w4, input=lb.presets["w4a8"].input),
        "W4A16, groups of 128": lb.presets["w4a16_g128"],
        "ternary, A8": lb.presets["w1_58a8"],
    }


def measure(sizes: Sizes, *, rounds: int) -> list[Timing]:
    """Checks every model, then times them in turns."""
    model = sizes.model()
    prompt = np.random.default_rng().integers(0, sizes.vocab, (1, sizes.prompt))
    models: dict[str, Any] = {DENSE: model}
    for name, scheme in schemes().items():
        quantized = lb.quantize_model(model, lb.Recipe(lb.Rule(".*", scheme)))
        packed = lb.prepare_model(jax.jit(lb.pack_model)(quantized))
        check(model, scheme, name, jnp.asarray(prompt, jnp.int32))
        models[name] = packed

    def writer(model: Any) -> Callable[[], Any]:
        return lambda: generate(model, prompt, sizes.tokens)

    runs = {name: writer(model) for name, model in models.items()}
    for run in runs.values():
        jax.block_until_ready(run())
    return interleaved(runs, rounds=rounds, baseline=DENSE)


def check(model: nnx.Module, scheme: lb.LayerScheme, name: str, prompt: jax.Array) -> None:
    """Raises unless a packed model has the logits of the quantized one, to 1e-4 of their spread.

    With float inputs: an activation that another order of a sum moves over a rounding boundary is
    off by 1 / 127 of the largest, and some such moves in 12 layers change the logits by 3 %.
    """
    weights = lb.Recipe(lb.Rule(".*", lb.LayerScheme(weight=scheme.weight)))
    quantized = lb.quantize_model(model, weights)
    packed = lb.prepare_model(jax.jit(lb.pack_model)(quantized))
    call = jax.jit(lambda model, x: model(x))
    expected, found = (np.asarray(call(m, prompt), np.float64) for m in (quantized, packed))
    error = float(np.abs(found - expected).max() / expected.std())
    if not error <= 1e-4:
        raise AssertionError(f"{name}: logits differ by {error:.1e} of their spread.")


def table(timings: list[Timing], sizes: Sizes) -> str:
    """The result as Markdown."""
    parameters = sum(leaf.size for leaf in jax.tree.leaves(nnx.eval_shape(sizes.model)))
    lines = [
        f"Writing {sizes.tokens} tokens behind {sizes.prompt}, {parameters:,} parameters, "
        f"{len(timings[0].seconds)} interleaved rounds, jax {jax.__version__}.",
        "",
        "| model | tokens/s (median) | times float32 | 25 % .. 75 % |",
        "|---|---|---|---|",
    ]
    lines += [
        f"| {t.name} | {sizes.tokens / t.median:.1f} | {1 / t.ratio:.2f} | "
        f"{1 / t.ratio_high:.2f} .. {1 / t.ratio_low:.2f} |"
        for t in timings
    ]
    return "\n".join(lines)
