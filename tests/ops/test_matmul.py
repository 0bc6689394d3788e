import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import lowbit_jax as lb
from lowbit_jax import ops
from lowbit_jax.testing import assert_same_bits, dot_tolerance

pytestmark = pytest.mark.usefixtures("cpu_kernels")
quantize = jax.jit(lb.quantize, static_argnames="spec")
matmul = jax.jit(lb.matmul, static_argnames=("act", "implementation", "out_dtype"))
PRESETS = [
    "w4a16_g32", "w3a16_asym", "w1_58a16", "w1a16", "w8a16", "nf4_g64", "nvfp4a16", "mxfp4a16"
]  # fmt: skip
HERE = ["xla", "cpu"]


def normal(shape, seed=0):
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


@functools.cache
def kernel(preset="w4a16_g32", shape=(64, 32)):
    return quantize(normal(shape), lb.presets[preset].weight.spec)


def int8_rows(x):
    scale = np.abs(x).max(axis=-1, keepdims=True) * np.float32(1 / 127)
    return np.clip(np.round(x * (np.float32(1) / scale)), -127, 127) * scale


@pytest.mark.parametrize("implementation", HERE)
@pytest.mark.parametrize("preset", PRESETS)
def test_it_is_the_product_with_the_dequantized_kernel(preset, implementation):
    x, bias, q = normal((2, 3, 64), 1), normal((32,), 2), kernel(preset)
    w = np.asarray(jax.jit(lambda q: q.dequantize())(q), np.float64)
    for act, x_hat in ((None, x), ("int8", int8_rows(x))):
        y = matmul(x, q, bias=bias, act=act, implementation=implementation)
        # One more rounding for the bias.
        atol = dot_tolerance(x, w) + np.finfo(np.float32).eps * np.abs(bias).max()
        np.testing.assert_allclose(y, x_hat.astype(np.float64) @ w + bias, rtol=1e-6, atol=atol)


@pytest.mark.parametrize("preset", PRESETS)
def test_what_is_prepared_holds_the_same_matrix_and_gives_the_same_product(preset):
    q, x = kernel(preset, (64, 24)), normal((3, 64), 1)
    for target in ("auto", "xla", "cpu"):
        prepared = jax.jit(lb.prepare, static_argnames="target")(q, target)
        assert prepared.shape == q.shape
        assert_same_bits(jax.jit(lambda p: p.dequantize())(prepared), q.dequantize(), target)
        tokens = jnp.array([0, -1, 23, 24])
        assert_same_bits(ops.lookup(tokens, prepared), ops.lookup(tokens, q), "lookup")
        name = "cpu" if target == "auto" else target
        assert prepared.meta.target == name
        assert_same_bits(matmul(x, prepared), matmul(x, q, implementation=name), target)
    with pytest.raises(NotImplementedError, match=r"prepare: target 'mosaic_tpu': the default"):
        lb.prepare(q, "mosaic_tpu")
    with pytest.raises(ValueError, match=r"'tpu' is not a backend. Backends: \['cpu', "):
        lb.prepare(q, "tpu")


def test_none_is_the_cpu_kernel_here():
    x = normal((3, 64))
    assert_same_bits(matmul(x, kernel()), matmul(x, kernel(), implementation="cpu"))
    assert "lowbit_cpu_matmul" in matmul.lower(x, kernel()).as_text()
    # Groups of 20 straddle words of 8 codes: XLA's form, unless the kernel is asked for by name.
    odd = quantize(normal((60, 16)), lb.QuantSpec(format=lb.INT4, granularity=lb.PerGroup(20)))
    assert "lowbit_cpu_matmul" not in matmul.lower(x[:, :60], odd).as_text()
    with pytest.raises(NotImplementedError, match="groups of 20 straddle words of 8 codes"):
        lb.matmul(x[:, :60], odd, implementation="cpu")


@pytest.mark.parametrize("act", [None, "int8"])
@pytest.mark.parametrize("preset", ["w4a16_g32", "w3a16_asym", "nf4_g64"])
def test_gradients_are_those_of_the_definition(preset, act):
    x, q = normal((5, 64), 1), kernel(preset)
    weights = jnp.cos(jnp.arange(5.0 * 32)).reshape(5, 32)

    def gradients(implementation):
        def loss(x, scale, bias):
            tensor = lb.QTensor(q.words, scale, q.zero_point, q.global_scale, q.spec, q.k, q.dtype)
            y = lb.matmul(x, tensor, act=act, bias=bias, implementation=implementation)
            return (weights * y).sum()

        return jax.jit(jax.grad(loss, argnums=(0, 1, 2)))(x, q.scale, jnp.ones(32))

    ours, definition = gradients("cpu"), gradients("xla")
    w = np.asarray(q.dequantize(), np.float64)
    # Through the rounding of x, the gradient passes straight.
    exact = np.asarray(weights, np.float64) @ w.T
    np.testing.assert_allclose(ours[0], exact, rtol=0, atol=dot_tolerance(weights, w.T))
    assert_same_bits(ours, definition)


def test_mapping_over_x_adds_rows_and_over_both_maps():
    q = kernel()
    x = normal((4, 3, 64), 1)
    over_x = jax.jit(jax.vmap(lb.matmul, in_axes=(0, None)))
    assert_same_bits(over_x(x, q), matmul(x, q))
    text = over_x.lower(x, q).as_text()
    assert text.count("custom_call @lowbit_cpu_matmul") == 1
    assert "while" not in text
    stack = jax.vmap(lambda w: lb.quantize(w, q.spec))(normal((4, 64, 32), 2))
    over_both = jax.jit(jax.vmap(lb.matmul))(x, stack)
    for i in range(4):
        one = jax.tree.map(lambda leaf, i=i: leaf[i], stack)
        assert_same_bits(over_both[i], matmul(x[i], one))


@pytest.mark.parametrize("prepared", [False, True])
@pytest.mark.parametrize(
    ("rows", "columns", "depth", "act"),
    [("a", "b", None, "int8"), (None, None, "b", None), ("a", None, "b", None)],
)
def test_a_mesh_cuts_rows_columns_and_whole_groups(rows, columns, depth, act, prepared):
    mesh = jax.make_mesh((2, 4), ("a", "b"), axis_types=(jax.sharding.AxisType.Auto,) * 2)
    q, x = kernel("w4a16_g32", (256, 64)), normal((4, 256), 1)
    expected = matmul(x, q, act=act)
    if prepared:
        q = lb.prepare(q)

    def place(leaf, *axes):
        return jax.device_put(leaf, jax.NamedSharding(mesh, jax.P(*axes)))

    def place_kernel(leaf):
        return place(leaf, columns, depth) if leaf.ndim == 3 else place(leaf, depth, columns)

    args = place(x, rows, depth), jax.tree.map(place_kernel, q)
    compiled = matmul.lower(*args, act=act).compile()
    y = compiled(*args)
    text = compiled.as_text()
    assert "all-gather" not in text
    assert ("all-reduce" in text) == (depth is not None)
    # The sum over 4 devices has another order.
    atol = dot_tolerance(x, np.asarray(q.dequantize())) if depth else 0
    np.testing.assert_allclose(y, expected, rtol=0, atol=atol)


def test_the_result_has_the_dtype_of_x_or_the_one_asked_for():
    x = jnp.ones((64,), jnp.bfloat16)
    shapes = functools.partial(jax.eval_shape, lb.matmul)
    assert shapes(x, kernel()).dtype == jnp.bfloat16
    assert shapes(x, kernel()).shape == (32,)
    asked = functools.partial(lb.matmul, out_dtype=jnp.dtype("float32"))
    assert jax.eval_shape(asked, x, kernel()).dtype == jnp.float32
    for dtype in (jnp.bfloat16, jnp.float16):
        x = normal((3, 64), 1).astype(dtype)
        exact = np.asarray(x, np.float64) @ np.asarray(kernel().dequantize(), np.float64)
        y = np.asarray(matmul(x, kernel()), np.float64)
        # Summed in float32 and rounded once.
        assert np.abs(y - exact).max() <= np.abs(exact).max() * float(jnp.finfo(dtype).eps)


@pytest.mark.parametrize("shape", [(3, 32), (), (64, 3)])
def test_lengths_that_differ_are_refused_with_both_shapes(shape):
    with pytest.raises(ValueError, match=r"x of shape .* against a kernel of shape \(64, 32\)"):
        lb.matmul(np.ones(shape, np.float32), kernel())


def test_a_stack_is_mapped():
    stack = jax.eval_shape(
        lambda x: lb.quantize(x, lb.presets["w4a16"].weight.spec), jnp.ones((2, 64, 8))
    )
    with pytest.raises(ValueError, match=r"Map over a stack with jax\.vmap"):
        lb.matmul(jnp.ones((2, 3, 64)), stack)
    mapped = jax.eval_shape(jax.vmap(lb.matmul), jnp.ones((2, 3, 64)), stack)
    assert mapped.shape == (2, 3, 8)


def test_bad_operands_are_refused():
    x, q = jnp.ones((3, 64)), kernel()
    with pytest.raises(ValueError, match=r"no implementation 'pallas'.*'mosaic_gpu', 'mosaic_tpu'"):
        lb.matmul(x, q, implementation="pallas")
    with pytest.raises(ValueError, match=r"no act='int4'. Formats: \['int8', 'fp8'\]"):
        lb.matmul(x, q, act="int4")
    with pytest.raises(NotImplementedError, match=r"'cpu' does not compute .* fp8 activations"):
        lb.matmul(x, q, act="fp8", implementation="cpu")
    with pytest.raises(NotImplementedError, match="the default backend is 'cpu', not 'gpu'"):
        lb.matmul(x, q, implementation="mosaic_gpu")
    with pytest.raises(ValueError, match="x has dtype int32; activations are float"):
        lb.matmul(jnp.ones((3, 64), jnp.int32), q)
    with pytest.raises(ValueError, match=r"bias of shape \(8,\) against N=32"):
        lb.matmul(x, q, bias=jnp.ones(8))
    rows = jax.eval_shape(
        lambda x: lb.quantize(x, lb.QuantSpec(format=lb.INT8, granularity=lb.PerToken())), x
    )
    with pytest.raises(ValueError, match="quantized int8 per token, as activations are"):
        lb.matmul(x, rows)


def test_empty_batches_and_values_that_are_not_finite():
    assert matmul(jnp.ones((0, 64)), kernel()).shape == (0, 32)
    assert matmul(jnp.ones((2, 0, 64)), kernel(), act="int8").shape == (2, 0, 32)
    x = normal((2, 64))
    x[1, 3] = np.nan
    for act in (None, "int8", "fp8"):
        y = np.asarray(matmul(x, kernel(), act=act))
        assert np.isnan(y).all(axis=1).tolist() == [False, True]


def test_fp8_activations_are_rounded_per_token():
    x = normal((3, 64), 1)
    spec = lb.QuantSpec(format=lb.FP8_E4M3, granularity=lb.PerToken())
    x_hat = quantize(x, spec).dequantize()
    y = matmul(x, kernel(), act="fp8")
    assert_same_bits(y, matmul(x_hat, kernel(), implementation="xla"))


def test_a_gpu_dequantizes_for_many_float_rows_and_no_other(monkeypatch):
    """The choice alone: no such device is here."""
    from lowbit_jax.ops import backends
    from lowbit_jax.ops.matmul import PREFILL, _choose
    from lowbit_jax.ops.prepared import canonical

    matrix = canonical(kernel())
    for name in ("mosaic_gpu", "mosaic_tpu", "cpu"):
        monkeypatch.setattr(backends, "choose", lambda meta, act, name=name: name)
        assert _choose(matrix, None, PREFILL - 1) == name
        assert _choose(matrix, "int8", PREFILL) == name
        assert _choose(matrix, None, PREFILL) == ("xla" if name == "mosaic_gpu" else name)
