"""The integer product alone; with layers around it: tests/nn/test_layers.py."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import lowbit_jax as lb
from lowbit_jax.ops.integer import DotGeneral, EinsumProduct, check_integer, integer_product

DOT = DotGeneral((((1,), (0,)), ((), ())))


def operands():
    rng = np.random.default_rng(0)
    x, w = (rng.integers(-127, 128, shape).astype(np.int8) for shape in ((3, 64), (64, 5)))
    x_scale, w_scale = (rng.uniform(0.01, 1, s).astype(np.float32) for s in ((3, 1), (1, 5)))
    return x * x_scale, w * w_scale, x, x_scale, w, w_scale


@pytest.mark.parametrize("contract", [DOT, EinsumProduct("bk,kn->bn")], ids=["dot", "einsum"])
def test_the_sum_is_exact_and_three_roundings_follow(contract):
    x_hat, w_hat, x, x_scale, w, w_scale = operands()
    y = integer_product(x_hat, w_hat, x, x_scale, w, w_scale, contract, jnp.dtype("float32"))
    exact = (x.astype(np.int64) @ w.astype(np.int64)) * (x_scale.astype(np.float64) * w_scale)
    # The sum as float32 (it is below 2**24: exact), the product of scales, and their product.
    assert np.abs(x.astype(np.int64) @ w.astype(np.int64)).max() < 2**24
    np.testing.assert_allclose(y, exact, rtol=2 * np.finfo(np.float32).eps / 2 * 1.01)


def test_the_gradients_are_those_of_the_float_product():
    x_hat, w_hat, *rest = operands()
    g = np.cos(np.arange(15, dtype=np.float32)).reshape(3, 5)

    def integer(x, w):
        return integer_product(x, w, *rest, DOT, jnp.dtype("float32"))

    got = jax.vjp(integer, x_hat, w_hat)[1](g)
    expected = jax.vjp(jnp.matmul, x_hat, w_hat)[1](g)
    for a, b in zip(got, expected, strict=True):
        np.testing.assert_array_equal(a, b)


def test_scales_are_multiplied_in_full_precision():
    # On a TPU the default would round them to bfloat16.
    jaxpr = jax.make_jaxpr(lambda *args: integer_product(*args, DOT, jnp.dtype("float32")))(
        *operands()
    )
    assert "Precision.HIGHEST" in str(jaxpr) or "precision=(HIGHEST" in str(jaxpr).replace(
        "Precision.", ""
    )


@pytest.mark.parametrize("name", ["w8a8", "w4a16", "w3a16", "w1_58a8", "w1a8_pc"])
def test_symmetric_integers_with_one_scale_along_k_are_admitted(name):
    check_integer(lb.presets[name].weight.spec, "kernels")


@pytest.mark.parametrize(
    ("name", "why"),
    [
        ("w4a16_g32", "scales in blocks"),
        ("w4a16_asym", "not symmetric integers"),
        ("w2a16", "not symmetric integers"),
        ("nvfp4a16", "not symmetric integers"),
        ("nf4_g64", "not symmetric integers"),
    ],
)
def test_others_are_refused_with_the_reason_and_the_way_out(name, why):
    with pytest.raises(
        NotImplementedError, match=f"int8 product: kernels .*{why}.*product='float'"
    ):
        check_integer(lb.presets[name].weight.spec, "kernels")
