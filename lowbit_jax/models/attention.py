"""Grouped-query self-attention with rotary positions (arXiv:2305.13245, arXiv:2104.09864)."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Bool, Float, Int32

from lowbit_jax.models.cache import AttendingCache, LayerCache
from lowbit_jax.models.config import DecoderConfig
from lowbit_jax.models.rotation import Rotated


@functools.cache  # layers that have the same one are seen to be alike
def residual_init(config: DecoderConfig) -> nnx.Initializer:
    """Initializer of kernels that write into the residual stream: lecun / sqrt(2 * layers).

    There are `2 * layers` such kernels, so that the stream's variance does not grow with depth.
    """
    return nnx.initializers.variance_scaling(
        0.5 / config.layers, mode="fan_in", distribution="truncated_normal"
    )


def rms_norm(config: DecoderConfig, features: int, *, rngs: nnx.Rngs) -> nnx.RMSNorm:
    """An RMSNorm that computes, and returns, float32 (arXiv:1910.07467)."""
    return nnx.RMSNorm(features, epsilon=config.norm_eps, dtype=jnp.float32, rngs=rngs)


def rotate(
    x: Float[Array, "batch length heads head_dim"],
    positions: Int32[Array, " length"],
    theta: float,
    factors: tuple[float, ...] | None = None,
) -> Float[Array, "batch length heads head_dim"]:
    """Rotary position embedding in float32 (Eq. 34 of arXiv:2104.09864).

    Features `i` and `i + head_dim / 2` are a pair, turned by the angle
    `position * theta ** (-2 * i / head_dim)`. That is the order of Hugging Face's checkpoints
    ("rotate half"); the paper pairs `2 * i` and `2 * i + 1`. The angle of pair `i` is divided by
    `factors[i]`, if there are any.
    """
    half = x.shape[-1] // 2
    exact = theta ** (-np.arange(half, dtype=np.float64) / half)
    frequencies = (exact if factors is None else exact / np.asarray(factors)).astype(np.float32)
    angles = positions.astype(jnp.float32)[None, :, None, None] * frequencies[None, None, None, :]
    cos, sin = jnp.cos(angles), jnp.sin(angles)
    first, second = jnp.split(x.astype(jnp.float32), 2, axis=-1)
    turned = jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1)
    return turned.astype(x.dtype)


def attend(
    query: Float[Array, "batch length heads head_dim"],
    key: Float[Array, "batch seen kv_heads head_dim"],
    value: Float[Array, "batch seen kv_heads head_dim"],
    *,
    mask: Bool[Array, "length seen"] | None = None,
    scale: float | None = None,
    softcap: float | None = None,
) -> Float[Array, "batch length heads head_dim"]:
    """Softmax attention in float32.

    Args:
        query: Head `h` asks the key head `h // (heads // kv_heads)`.
        key: One row for each position that can be seen.
        value: As `key`.
        mask: Which positions each query sees; None: its own and those before it.
        scale: Factor of the scores; None: `head_dim ** -0.5`.
        softcap: Scores s become `softcap * tanh(s / softcap)` (arXiv:2408.00118).
    """
    if softcap is None:
        if mask is None:
            return jax.nn.dot_product_attention(query, key, value, scale=scale, is_causal=True)
        return jax.nn.dot_product_attention(query, key, value, mask=mask[None, None], scale=scale)
    batch, length, heads, width = query.shape
    seen, groups = key.shape[1], key.shape[2]
    if mask is None:
        mask = jnp.tri(length, seen, dtype=bool)
    grouped = query.reshape(batch, length, groups, heads // groups, width)
    scores = jnp.einsum("btghd,bsgd->bghts", grouped, key, preferred_element_type=jnp.float32)
    scores = scores * jnp.float32(width**-0.5 if scale is None else scale)
    scores = softcap * jnp.tanh(scores * jnp.float32(1 / softcap))
    scores = jnp.where(mask[None, None, None], scores, jnp.finfo(jnp.float32).min)
    weights = jax.nn.softmax(scores, axis=-1).astype(value.dtype)
    y = jnp.einsum("bghts,bsgd->btghd", weights, value, preferred_element_type=jnp.float32)
    return y.reshape(query.shape).astype(query.dtype)


def visible(
    positions: Int32[Array, " length"], seen: int, window: int = 0
) -> Bool[Array, "length seen"]:
    """Which of the first `seen` positions the tokens at `positions` look at.

    Args:
        positions: Of the tokens that look; what lies behind them is later, or not written yet.
        seen: How many positions there are to look at.
        window: Positions that a token sees, its own included; 0: all before it.
    """
    others = jnp.arange(seen)[None, :]
    mask = others <= positions[:, None]
    return mask & (others > positions[:, None] - window) if window else mask


class Attention(nnx.Module):
    """Causal self-attention: `query`, `key`, `value`, `out`; scores and softmax in float32.

    window: Positions that a token sees, its own included; 0: all before it.
    """

    def __init__(self, config: DecoderConfig, *, window: int = 0, rngs: nnx.Rngs):
        self.config = config
        self.window = window
        width, kv_width = config.heads * config.head_size, config.kv_heads * config.head_size
        linear = functools.partial(nnx.Linear, dtype=config.compute_dtype, rngs=rngs)
        self.query = linear(config.dim, width, use_bias=config.qkv_bias)
        self.key = linear(config.dim, kv_width, use_bias=config.qkv_bias)
        self.value = linear(config.dim, kv_width, use_bias=config.qkv_bias)
        self.out: nnx.Linear | Rotated = linear(
            width, config.dim, use_bias=False, kernel_init=residual_init(config)
        )
        if config.qk_norm:
            self.query_norm = rms_norm(config, config.head_size, rngs=rngs)
            self.key_norm = rms_norm(config, config.head_size, rngs=rngs)
        if config.sub_norm:
            self.out_norm = rms_norm(config, width, rngs=rngs)

    def __call__(
        self,
        x: Float[Array, "batch length dim"],
        cache: LayerCache | AttendingCache | None = None,
    ) -> Float[Array, "batch length dim"]:
        """Each token attends to itself and what came before it; the cache, if any, takes `x` in."""
        config, (batch, length, _) = self.config, x.shape
        query = self.query(x).reshape(batch, length, config.heads, config.head_size)
        key = self.key(x).reshape(batch, length, config.kv_heads, config.head_size)
        value = self.value(x).reshape(batch, length, config.kv_heads, config.head_size)
        if config.qk_norm:
            query = self.query_norm(query).astype(config.compute_dtype)
            key = self.key_norm(key).astype(config.compute_dtype)

        start = 0 if cache is None else cache.length
        positions = start + jnp.arange(length, dtype=jnp.int32)
        theta, factors = config.rope_theta, config.rope_factors
        if self.window and config.local_rope_theta is not None:
            theta, factors = config.local_rope_theta, None
        query = rotate(query, positions, theta, factors)
        key = rotate(key, positions, theta, factors)
        options = {"scale": config.query_scale, "softcap": config.attention_softcap}
        if isinstance(cache, AttendingCache):
            y = cache.attend(query, key, value, window=self.window, **options)
        else:
            mask = None
            if cache is not None:
                key, value, _ = cache.update(key, value)
            if cache is not None or self.window:
                mask = visible(positions, key.shape[1], self.window)
            y = attend(query, key, value, mask=mask, **options)

        y = y.reshape(batch, length, config.heads * config.head_size)
        if config.sub_norm:
            y = self.out_norm(y).astype(config.compute_dtype)
        return self.out(y)
