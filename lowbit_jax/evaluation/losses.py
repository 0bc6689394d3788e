"""Cross-entropy: the one that training descends and evaluation reports."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Integer


def token_nll(
    logits: Float[Array, "*batch vocab"], targets: Integer[Array, "*batch"]
) -> Float[Array, "*batch"]:
    """-log p(target) of each token, in nats: logsumexp(logits) - logits[target], in float32.

    A target outside [0, vocab) has no probability: its value is NaN.
    """
    logits = logits.astype(jnp.float32)
    # Negative indices would count from the end; the mode "fill" is NaN for what lies outside.
    targets = jnp.where(targets < 0, logits.shape[-1], targets)
    chosen = jnp.take_along_axis(logits, targets[..., None], axis=-1, mode="fill")
    return jax.nn.logsumexp(logits, axis=-1) - chosen[..., 0]


def cross_entropy(
    logits: Float[Array, "*batch vocab"],
    targets: Integer[Array, "*batch"],
    mask: Bool[Array, "*batch"] | None = None,
) -> Float[Array, ""]:
    """The mean of `token_nll` over the tokens that `mask` selects, or over all, in nats a token.

    What is masked has no influence, even where it is NaN, and no gradient. The mean of no tokens
    is NaN.
    """
    if mask is None:
        return jnp.mean(token_nll(logits, targets))
    # Masked before the logarithm: behind it, the gradient of a NaN times zero would be NaN.
    safe = jnp.where(mask[..., None], logits, 0)
    nll = token_nll(safe, jnp.where(mask, targets, 0))
    return jnp.sum(jnp.where(mask, nll, 0)) / jnp.sum(mask)
