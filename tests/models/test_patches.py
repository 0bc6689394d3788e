"""A convolution by patches is XLA's convolution, and so are its gradients."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

from lowbit_jax.models import convolve_by_patches

IMAGES = jnp.asarray(np.random.default_rng(0).normal(size=(2, 7, 6, 3)), jnp.float32)
KERNEL = jnp.asarray(np.random.default_rng(1).normal(size=(3, 2, 3, 4)), jnp.float32)
LAYOUT = lax.ConvDimensionNumbers((0, 3, 1, 2), (3, 2, 0, 1), (0, 3, 1, 2))


@pytest.mark.parametrize(
    ("strides", "padding"), [((1, 1), "VALID"), ((2, 1), "SAME"), ((1, 2), ((0, 1), (2, 0)))]
)
def test_values_and_gradients_are_those_of_xla(strides, padding):
    @functools.partial(jax.jit, static_argnums=0)
    def both(convolve, images, kernel):
        def apply(images, kernel):
            return convolve(images, kernel, strides, padding, dimension_numbers=LAYOUT)

        out, pull = jax.vjp(apply, images, kernel)
        return out, *pull(jnp.cos(out))

    got = both(convolve_by_patches, IMAGES, KERNEL)
    want = both(lax.conv_general_dilated, IMAGES, KERNEL)
    for a, b in zip(got, want, strict=True):
        # Sums of at most 2 * 7 * 6 terms in another order; the gradients start from cos(out),
        # which moves by what out does, so that two such sums follow each other.
        atol = 2 * 2 * 7 * 6 * np.finfo(np.float32).eps * float(jnp.max(jnp.abs(b)))
        np.testing.assert_allclose(a, b, rtol=0, atol=atol)


@pytest.mark.parametrize(
    "options", [{"feature_group_count": 3}, {"rhs_dilation": (1, 2)}, {"lhs_dilation": (2, 1)}]
)
def test_what_it_does_not_compute_is_refused(options):
    with pytest.raises(NotImplementedError, match=r"without dilation and groups"):
        convolve_by_patches(IMAGES, KERNEL, (1, 1), "VALID", **options)
