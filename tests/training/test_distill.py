import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from lowbit_jax.models import Decoder, DecoderConfig
from lowbit_jax.training.distill import Teacher, distillation_loss, divergence


def test_divergence_is_the_formula_and_zero_for_equal_logits():
    random = np.random.default_rng(0)
    student, teacher = random.normal(size=(2, 2, 3, 5)).astype(np.float32)
    p, q = (np.exp(x / 2.0) / np.exp(x / 2.0).sum(-1, keepdims=True) for x in (teacher, student))
    expected = (p * np.log(p / q)).sum(-1).mean()
    got = divergence(jnp.asarray(student), jnp.asarray(teacher), 2.0)
    # Sums of 5 products of float32 numbers of order 1.
    np.testing.assert_allclose(got, expected, rtol=0, atol=20 * np.finfo(np.float32).eps)
    assert float(divergence(jnp.asarray(teacher), jnp.asarray(teacher), 2.0)) == 0.0


@pytest.mark.parametrize("weight", [0.0, 0.25, 1.0])
def test_loss_mixes_labels_and_teacher_and_the_teacher_gets_no_gradient(weight):
    config = DecoderConfig(vocab=7, dim=8, layers=1, heads=1, kv_heads=1, ffn_dim=8, max_length=4)
    model = Decoder(config, rngs=nnx.Rngs(0))
    teacher = Teacher.of(model, temperature=3.0, weight=weight)
    inputs = jnp.arange(4, dtype=jnp.int32)[None, :]
    logits, nll = jnp.zeros((1, 4, 7)), jnp.float32(2.0)
    soft = divergence(logits, model(inputs), 3.0)
    got = distillation_loss(nll, logits, inputs, teacher, teacher.state)
    np.testing.assert_allclose(got, (1 - weight) * 2.0 + weight * 9.0 * soft, rtol=1e-6)
    grads = jax.grad(
        lambda state: distillation_loss(nll, logits, inputs, teacher, state), allow_int=True
    )(teacher.state)
    assert all(not np.any(np.asarray(g)) for g in jax.tree.leaves(grads))
