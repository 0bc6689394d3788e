import jax.numpy as jnp
import numpy as np
import optax

from lowbit_jax.training.config import OptimConfig
from lowbit_jax.training.optimizer import decay_mask, make_optimizer

PARAMS = {
    "embed": {"embedding": jnp.ones((4, 2))},
    "up": {"kernel": jnp.ones((2, 2)), "bias": jnp.ones((2,)), "kernel_scale": jnp.ones((1, 2))},
    # As in a scanned stack, where a norm's scale and a bias are matrices.
    "layers": {"norm": {"scale": jnp.ones((3, 2))}, "up": {"bias": jnp.ones((3, 2))}},
}


def updates(config, gradient=0.0):
    optimizer = make_optimizer(config, steps=10)
    grads = {
        "embed": {"embedding": jnp.full((4, 2), gradient)},
        "up": {
            "kernel": jnp.full((2, 2), gradient),
            "bias": jnp.full((2,), gradient),
            "kernel_scale": jnp.full((1, 2), gradient),
        },
        "layers": {
            "norm": {"scale": jnp.full((3, 2), gradient)},
            "up": {"bias": jnp.full((3, 2), gradient)},
        },
    }
    return optimizer.update(grads, optimizer.init(PARAMS), PARAMS)[0]


def test_only_kernels_and_embeddings_decay():
    assert decay_mask(PARAMS) == {
        "embed": {"embedding": True},
        "up": {"kernel": True, "bias": False, "kernel_scale": False},
        "layers": {"norm": {"scale": False}, "up": {"bias": False}},
    }
    # With zero gradients AdamW's update is -lr * weight_decay * w.
    got = updates(OptimConfig(lr=0.5, weight_decay=0.1, schedule="constant", warmup=0))
    np.testing.assert_allclose(got["up"]["kernel"], -0.05, rtol=1e-6)
    np.testing.assert_array_equal(got["up"]["kernel_scale"], 0.0)
    np.testing.assert_array_equal(got["layers"]["norm"]["scale"], 0.0)


def test_learned_scales_move_at_their_own_rate():
    base = OptimConfig(lr=0.5, weight_decay=0.0, schedule="constant", warmup=0, clip=0.0)
    plain = updates(base, gradient=0.25)
    base.scale_lr = 0.125
    slow = updates(base, gradient=0.25)
    # Adam's first step is -lr * sign(g), up to eps / |g|.
    np.testing.assert_allclose(plain["up"]["kernel_scale"], -0.5, rtol=1e-6)
    np.testing.assert_allclose(slow["up"]["kernel_scale"], -0.0625, rtol=1e-6)
    np.testing.assert_array_equal(slow["up"]["kernel"], plain["up"]["kernel"])


def test_clipping_bounds_the_norm_that_adam_sees():
    config = OptimConfig(clip=2.0)
    optimizer = make_optimizer(config, steps=10)
    params = {"kernel": jnp.zeros((2, 2))}
    grads = {"kernel": jnp.full((2, 2), 100.0)}
    _, state = optimizer.update(grads, optimizer.init(params), params)
    momentum = optax.tree.get(state, "mu")["kernel"] / (1 - config.beta1)
    # Norm 200 becomes 2: every element 1.
    np.testing.assert_allclose(momentum, 1.0, rtol=1e-6)
