"""A random decoder with grouped-query attention and norm scales far from 1, and one block of it."""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from lowbit_jax.models import Decoder, DecoderConfig
from lowbit_jax.models.wiring import wiring_of
from lowbit_jax.presets import presets
from lowbit_jax.ptq.chain import Chain, capture
from lowbit_jax.ptq.stage import BlockWork, ModelWork
from lowbit_jax.walk import layers

CONFIG = DecoderConfig(
    vocab=24, dim=16, layers=1, heads=4, kv_heads=2, ffn_dim=24, max_length=8, norm_eps=1e-5
)
# What only other stages use of a block's work.
_KNOWN = ("name", "original", "schemes", "chain", "chain_hat", "key", "wiring", "note")
_REST = [f.name for f in dataclasses.fields(BlockWork) if f.name not in _KNOWN]


@dataclasses.dataclass
class Bench:
    """Makes what transforms work on, and keeps what they say."""

    notes: list[tuple[str, dict[str, Any]]]
    messages: list[str]

    def draw(self, make: Callable[[], nnx.Module]) -> nnx.Module:
        """The model `make` builds, all parameters random: also norms, biases and statistics."""
        graphdef, state = nnx.split(nnx.eval_shape(make))
        rng = np.random.default_rng(0)

        def draw(path, leaf):
            if path[-1] in ("scale", "var"):
                value = rng.uniform(0.3, 3.0, leaf.shape)
            else:
                value = rng.normal(size=leaf.shape) * (leaf.shape[0] ** -0.5)
            return leaf.replace(np.float32(value))

        return nnx.merge(graphdef, jax.device_put(nnx.map_state(draw, state)))

    def decoder(self, **changes: Any) -> Decoder:
        """A random decoder."""
        config = dataclasses.replace(CONFIG, **changes)
        return self.draw(lambda: Decoder(config, rngs=nnx.Rngs(0)))

    def tokens(self) -> jax.Array:
        """Tokens of two short sequences."""
        return jnp.asarray(np.random.default_rng(1).integers(0, CONFIG.vocab, (2, 8)), jnp.int32)

    def block(self, model: Decoder, preset: str = "w3a16_asym") -> BlockWork:
        """The first block, every linear layer of it to be quantized as the preset says."""
        chain = capture(model, ["layers/0"], [self.tokens()], lambda m, x: m(x))
        return self.work(model.layers[0], chain, wiring_of(model), preset)

    def work(self, block: nnx.Module, chain: Chain, wiring: Any, preset: str) -> BlockWork:
        """Any block with its inputs."""
        linear = (nnx.Linear, nnx.Conv)
        schemes = {p: presets[preset] for p, m in layers(block) if isinstance(m, linear)}
        key = jax.random.key(0)
        note = lambda path, figures: self.notes.append((path, figures))  # noqa: E731
        rest = dict.fromkeys(_REST)
        return BlockWork("block", block, schemes, chain, chain, key, wiring, note, **rest)

    def whole(self, model: nnx.Module, preset: str = "w4a16") -> ModelWork:
        """A whole model, every linear layer of its blocks to be quantized."""
        schemes = {
            p: presets[preset]
            for p, m in layers(model)
            if p.startswith("layers/") and isinstance(m, (nnx.Linear, nnx.Conv))
        }
        return ModelWork(
            model=model,
            reference=model,
            schemes=schemes,
            batches=[self.tokens()],
            forward=lambda m, x: m(x),
            key=jax.random.key(0),
            wiring=wiring_of(model),
            note=lambda path, figures: self.notes.append((path, figures)),
            emit=lambda kind, **fields: self.messages.append(fields.get("text", "")),
        )


@pytest.fixture
def bench() -> Bench:
    return Bench([], [])


def assert_same_function(before: Any, after: Any, scale: float = 1e-5) -> None:
    """Equal to 1e-5 of the largest output: float32 sums of a few dozen terms, folded anew."""
    before, after = np.asarray(before), np.asarray(after)
    np.testing.assert_allclose(after, before, rtol=0, atol=scale * np.abs(before).max())


@pytest.fixture(scope="session", name="assert_same_function")
def _assert_same_function() -> Callable[..., None]:
    return assert_same_function
