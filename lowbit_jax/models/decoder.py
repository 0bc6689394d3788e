"""A decoder-only transformer of the Llama family in plain Flax NNX, for training and generation.

    x = embed(tokens)
    for each layer:
        x += attention(norm(x))
        x += down(silu(gate(norm(x))) * up(norm(x)))
    logits = head(norm(x))

`DecoderConfig` says what the family's members do otherwise: another gate, norms elsewhere, bounded
scores and logits, windows.

Every weight sits in an `nnx.Linear` or `nnx.Embed` that is only ever called, so that any of them
can be swapped for a twin with the same call. Parameters are float32; `config.dtype` is the type of
the residual stream and of the products; norms, softmax and logits are float32.

`stacked=True` keeps all blocks as one, with a leading axis of length `layers` on every array, and
scans it: compile time does not grow with depth. The price is that each step of the scan copies its
layer's slice out of the stack. The same seed gives the same weights in both forms.
"""

import functools
from collections.abc import Callable, Sequence
from typing import Any, cast

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Float32, Int

from lowbit_jax.models.attention import Attention, residual_init, rms_norm
from lowbit_jax.models.cache import AttendingCache, KVCache, LayerCache
from lowbit_jax.models.config import DecoderConfig
from lowbit_jax.models.registry import register
from lowbit_jax.models.rotation import Rotated, Rotation

_ACTIVATIONS: dict[str, Callable[[jax.Array], jax.Array]] = {
    "silu": nnx.silu,
    "gelu_tanh": functools.partial(nnx.gelu, approximate=True),
}


class GatedMLP(nnx.Module):
    """`down(act(gate(x)) * up(x))`; with silu it is SwiGLU (arXiv:2002.05202)."""

    def __init__(self, config: DecoderConfig, *, rngs: nnx.Rngs):
        self.config = config
        linear = functools.partial(
            nnx.Linear, use_bias=False, dtype=config.compute_dtype, rngs=rngs
        )
        self.gate = linear(config.dim, config.ffn_dim)
        self.up = linear(config.dim, config.ffn_dim)
        self.down: nnx.Linear | Rotated = linear(
            config.ffn_dim, config.dim, kernel_init=residual_init(config)
        )
        if config.sub_norm:
            self.down_norm = rms_norm(config, config.ffn_dim, rngs=rngs)

    def __call__(self, x: Float[Array, "*batch dim"]) -> Float[Array, "*batch dim"]:
        """Applies the layer to each position on its own."""
        hidden = _ACTIVATIONS[self.config.activation](self.gate(x)) * self.up(x)
        if self.config.sub_norm:
            hidden = self.down_norm(hidden).astype(self.config.compute_dtype)
        return self.down(hidden)


class Block(nnx.Module):
    """One layer of the decoder: attention and MLP, each behind its norm and added to the stream.

    window: As of `Attention`.
    """

    def __init__(self, config: DecoderConfig, *, window: int = 0, rngs: nnx.Rngs):
        self.config = config
        self.attention_norm = rms_norm(config, config.dim, rngs=rngs)
        self.attention = Attention(config, window=window, rngs=rngs)
        self.mlp_norm = rms_norm(config, config.dim, rngs=rngs)
        self.mlp = GatedMLP(config, rngs=rngs)
        if config.post_norm:
            self.attention_post_norm = rms_norm(config, config.dim, rngs=rngs)
            self.mlp_post_norm = rms_norm(config, config.dim, rngs=rngs)
        if "attention/out" in config.online:
            rotation = Rotation.of(config.heads, config.head_size)
            self.attention.out = Rotated(self.attention.out, rotation)
        if "mlp/down" in config.online:
            self.mlp.down = Rotated(self.mlp.down, Rotation.of(config.ffn_dim))

    def __call__(
        self,
        x: Float[Array, "batch length dim"],
        cache: LayerCache | AttendingCache | None = None,
    ) -> Float[Array, "batch length dim"]:
        """Applies the block; with a cache, `x` continues the tokens that the cache holds."""
        dtype = self.config.compute_dtype
        attended = self.attention(self.attention_norm(x).astype(dtype), cache)
        if self.config.post_norm:
            attended = self.attention_post_norm(attended).astype(dtype)
        x = x + attended
        mixed = self.mlp(self.mlp_norm(x).astype(dtype))
        if self.config.post_norm:
            mixed = self.mlp_post_norm(mixed).astype(dtype)
        return x + mixed


@register("decoder")
class Decoder(nnx.Module):
    """Tokens in, logits of the next token out; see the module's docstring.

    Example:
        >>> config = DecoderConfig(
        ...     vocab=256, dim=32, layers=2, heads=4, kv_heads=2, ffn_dim=64, max_length=16)
        >>> model = Decoder(config, rngs=nnx.Rngs(0))
        >>> model(jnp.zeros((1, 8), jnp.int32)).shape
        (1, 8, 256)
    """

    def __init__(self, config: DecoderConfig, *, rngs: nnx.Rngs):
        self.config = config
        self.embed = nnx.Embed(
            config.vocab,
            config.dim,
            dtype=config.compute_dtype,
            embedding_init=nnx.initializers.normal(0.02),
            rngs=rngs,
        )
        windows = map(config.window, range(config.layers))
        blocks = [Block(config, window=window, rngs=rngs) for window in windows]
        self.layers = _stack(blocks) if config.stacked else nnx.List(blocks)
        self.norm = rms_norm(config, config.dim, rngs=rngs)
        if not config.tied:
            self.head = nnx.Linear(
                config.dim,
                config.vocab,
                use_bias=False,
                dtype=config.compute_dtype,
                preferred_element_type=jnp.float32,
                rngs=rngs,
            )

    def __call__(
        self, tokens: Int[Array, "batch length"], cache: nnx.Module | None = None
    ) -> Float32[Array, "batch length vocab"]:
        """Logits of the token after each of `tokens`.

        Args:
            tokens: Token ids in `[0, vocab)`; an id outside gives NaN.
            cache: From `init_cache`; then `tokens` continue what it holds, and it takes them in.
        Returns: Unnormalized log-probabilities. A tied head in bfloat16 has rounded them to that.
        Raises: ValueError: more tokens than `config.max_length`.
        """
        return self.logits(self.features(tokens, cache))

    def features(
        self, tokens: Int[Array, "batch length"], cache: nnx.Module | None = None
    ) -> Float[Array, "batch length dim"]:
        """What `logits` reads: the last block's output, normalized. Arguments as of `__call__`."""
        if tokens.shape[1] > self.config.max_length:
            raise ValueError(
                f"decoder: a context of {tokens.shape[1]} tokens is longer than "
                f"max_length={self.config.max_length}, beyond which no position was trained. "
                f"Shorten the context, or build the model with a larger max_length."
            )
        x = self.embed(tokens)
        if self.config.embed_scale != 1:
            x = x * jnp.asarray(self.config.embed_scale, x.dtype)
        if self.config.stacked:
            x = _scan(self.layers, x, cache)
        else:
            layers = cast(nnx.List[Block], self.layers)
            caches = [None] * len(layers) if cache is None else cast(nnx.List[LayerCache], cache)
            for layer, layer_cache in zip(layers, caches, strict=True):
                x = layer(x, layer_cache)
        return self.norm(x).astype(self.config.compute_dtype)

    def logits(self, features: Float[Array, "*batch dim"]) -> Float32[Array, "*batch vocab"]:
        """Applies the head, which is the embedding's transpose if `tied`."""
        logits = self.embed.attend(features) if self.config.tied else self.head(features)
        logits = logits.astype(jnp.float32)
        cap = self.config.logit_softcap
        return logits if cap is None else cap * jnp.tanh(logits * jnp.float32(1 / cap))

    def init_cache(self, batch: int, capacity: int) -> nnx.Module:
        """An empty cache for `batch` sequences of up to `capacity` tokens: a `KVCache` per layer.

        Raises: ValueError: `capacity` is longer than `config.max_length`.
        """
        config = self.config
        if capacity > config.max_length:
            raise ValueError(
                f"decoder: a cache for {capacity} tokens is longer than "
                f"max_length={config.max_length}. Ask for fewer tokens, or build the model with a "
                f"larger max_length."
            )
        sizes = (batch, capacity, config.kv_heads, config.head_size, config.compute_dtype)
        caches = [KVCache(*sizes) for _ in range(config.layers)]
        return _stack(caches) if config.stacked else nnx.List(caches)


def _stack(modules: Sequence[nnx.Module]) -> nnx.Module:
    """One module like each of `modules`, its arrays stacked along a new first axis."""
    graphdef = nnx.graphdef(modules[0])
    states = [nnx.state(module) for module in modules]
    return nnx.merge(graphdef, jax.tree.map(lambda *arrays: jnp.stack(arrays), *states))


def _scan(
    layers: nnx.Module, x: Float[Array, "batch length dim"], cache: nnx.Module | None
) -> Float[Array, "batch length dim"]:
    """Applies stacked layers in order; what they and their caches write to themselves is kept."""
    graphdef, state = nnx.split((layers, cache))

    def body(x, state):
        before = {path: variable[...] for path, variable in nnx.to_flat_state(state)}
        layer, layer_cache = nnx.merge(graphdef, state)
        x = layer(x, layer_cache)
        # Only what was written goes out: a model that a jit closes over may not be written to.
        after = nnx.to_flat_state(nnx.state((layer, layer_cache)))
        return x, {path: v[...] for path, v in after if _differs(v[...], before[path])}

    x, written = jax.lax.scan(body, x, state)
    variables = dict(nnx.to_flat_state(nnx.state((layers, cache))))
    for path, value in written.items():
        variables[path].set_value(value)
    return x


def _differs(after: Any, before: Any) -> bool:
    """Whether any array of a variable's value (which may be a tree of them) is another object."""
    pairs = zip(jax.tree.leaves(after), jax.tree.leaves(before), strict=True)
    return any(new is not old for new, old in pairs)
