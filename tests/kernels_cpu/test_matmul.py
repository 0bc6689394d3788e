"""The C++ kernels against float64 NumPy, for every width of codes and instruction set."""

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import kernels_cpu
from kernels_cpu import Codes, reference
from kernels_cpu.api import _WIDTHS

E2M1 = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0, 0.0, -0.5, -1.0, -1.5, -2.0, -3.0, -4.0, -6.0)
NF4_LIKE = tuple(np.linspace(-1, 1, 16) ** 3)
# The best of this machine, and the one that every machine has.
SETS = ("", "portable")
KINDS = {
    "binary": Codes(1, 2.0, -1.0),
    "two_bits_half_shifted": Codes(2, 1.0, -1.5),
    "ternary": Codes(2, 1.0, -1.0),
    **{f"int{bits}": Codes(bits, 1.0, -(2.0 ** (bits - 1))) for bits in range(2, 9)},
    "uint4": Codes(4),
    "fp4": Codes(4, table=E2M1),
    "codebook": Codes(4, table=NF4_LIKE),
    "codebook_of_3_bits": Codes(3, table=NF4_LIKE[::2]),
}
ZERO_POINTS = ("uint4", "int3", "int8")


def words_of(code, bits):
    """Planes of codes [K, N], packed by NumPy as design.md says."""
    k = code.shape[0]
    code = np.pad(code, ((0, -k % 32), (0, 0))).astype(np.uint64)
    planes, shift = [], 0
    for width in _WIDTHS[bits]:
        fields = ((code >> shift) & (2**width - 1)).reshape(-1, 32 // width, code.shape[1])
        places = (np.arange(32 // width, dtype=np.uint64) * np.uint64(width))[None, :, None]
        words = (fields << places).sum(axis=1).astype(np.uint32)
        planes.append(words.view(np.int32))
        shift += width
    return tuple(planes)


def problem(kind, k, n, m, group, seed=0, zero_points=False):
    rng = np.random.default_rng(seed)
    codes = KINDS[kind]
    codes = Codes(codes.bits, codes.step, codes.low, codes.table, group)
    top = 3 if kind == "ternary" else 2**codes.bits
    code = rng.integers(0, top, (k, n))
    code[: k // 2, 0], code[k // 2 :, 0] = 0, top - 1  # one column of extremes
    groups = k // (group or k)
    scale = rng.uniform(0.5, 2, (groups, n)).astype(np.float32)
    zero_point = rng.integers(0, 2**codes.bits, (groups, n)).astype(np.uint8)
    x = rng.normal(size=(m, k)).astype(np.float32)
    if m > 1:
        x[1, k // 2] = 1e4  # an outlier
        x[0] = 0
    return x, words_of(code, codes.bits), scale, zero_point if zero_points else None, codes


@functools.partial(jax.jit, static_argnames=("codes", "n", "act", "instructions", "panels"))
def matmul(x, words, scale, zero_point, codes, n, act, instructions="", panels=False):
    if panels:
        words = tuple(kernels_cpu.panels(plane) for plane in words)
    return kernels_cpu.matmul(
        x, words, scale, zero_point, codes=codes, n=n, act=act, instructions=instructions
    )


def check(x, words, scale, zero_point, codes, act, **options):
    k, n = x.shape[1], scale.shape[1]
    y = np.asarray(matmul(x, words, scale, zero_point, codes, n, act, **options))
    w = reference.dequantize(words, scale, zero_point, codes, k)
    x_hat = reference.round_rows(x) if act else x.astype(np.float64)
    exact = x_hat @ w
    magnitude = np.abs(x_hat) @ np.abs(w)
    # Float: k products and sums, each rounded once. Integer: exact in each of the groups (one
    # float32 conversion), then one product and one sum a group, and two factors; the offset of the
    # codes enters exactly, so no cancellation is to be allowed for.
    eps = np.finfo(np.float32).eps
    roundings = (len(scale) * max(1, k // len(scale) // 8192 + 1) + 4) if act else k + 4
    assert y.shape == exact.shape
    finite = np.isfinite(exact)
    assert (np.isnan(y) == ~finite).all()
    # Integer sums above 2**24 are rounded when they become floats.
    slack = roundings * eps * np.where(finite, magnitude, 0)
    np.testing.assert_array_less(np.abs(y - exact)[finite], (slack + 1e-30)[finite])


CASES = [
    (kind, shape, zero)
    for kind in KINDS
    for shape in [(96, 16, 1, None), (128, 40, 3, 32)]
    for zero in ([False, True] if kind in ZERO_POINTS else [False])
]


@pytest.mark.parametrize("act", [None, "int8"])
@pytest.mark.parametrize(("kind", "shape", "zero"), CASES)
def test_every_kind_of_code_on_every_instruction_set(kind, shape, zero, act):
    k, n, m, group = shape
    x, words, scale, zero_point, codes = problem(kind, k, n, m, group, zero_points=zero)
    if kernels_cpu.unsupported(codes, act):
        assert kind.startswith("codebook")
        assert act == "int8"
        return
    for instructions, panels in itertools.product(SETS, [False, True]):
        check(x, words, scale, zero_point, codes, act, instructions=instructions, panels=panels)


@pytest.mark.parametrize("m", [1, 2, 4, 5, 9, 33])
def test_every_number_of_rows(m):
    for act in (None, "int8"):
        check(*problem("int4", 64, 24, m, 32), act)


# Odd lengths: K that fills no word, N that fills no panel, one of each.
@pytest.mark.parametrize(("k", "n"), [(1, 1), (43, 17), (172, 5), (33, 48), (31, 16)])
def test_odd_shapes(k, n):
    for kind, act in itertools.product(["int4", "int3", "binary", "codebook"], [None, "int8"]):
        if kind != "codebook" or act is None:
            check(*problem(kind, k, n, 3, None), act)


def test_sums_that_are_cut_to_fit_31_bits():
    # 20,000 extremes of 8 bits times 127 overflow int32 if they are summed at once and doubled.
    k = 20_000
    words, scale = words_of(np.full((k, 16), 255), 8), np.ones((1, 16), np.float32)
    x = np.full((1, k), -3.0, np.float32)
    check(x, words, scale, None, KINDS["int8"], "int8")
    check(x, words, scale, np.full((1, 16), 255, np.uint8), Codes(8), "int8")


@settings(max_examples=40, deadline=None)
@given(
    st.sampled_from(sorted(KINDS)),
    st.integers(1, 3),
    st.sampled_from([None, 8, 16, 32, 64]),
    st.integers(1, 50),
    st.integers(0, 6),
    st.sampled_from([None, "int8"]),
    st.integers(0, 2**31),
)
def test_shapes_at_random(kind, groups, group, n, m, act, seed):
    k = groups * (group or 37)
    args = problem(kind, k, n, m, group, seed, kind in ZERO_POINTS and bool(seed % 2))
    reason = kernels_cpu.unsupported(args[-1], act)
    if reason is None:
        check(*args, act)
        return
    with pytest.raises(NotImplementedError, match=r"straddle|not integers"):
        kernels_cpu.matmul(*args[:4], codes=args[4], n=n, act=act)


@pytest.mark.parametrize("act", [None, "int8"])
@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_a_row_that_is_not_finite_leaves_the_others_alone(value, act):
    x, *rest = problem("int4", 64, 16, 6, 32)
    clean = np.asarray(matmul(x, *rest, 16, act))
    x = x.copy()
    x[2, 5] = value
    y = np.asarray(matmul(x, *rest, 16, act))
    others = [0, 1, 3, 4, 5]
    np.testing.assert_array_equal(y[others], clean[others])
    assert not np.isfinite(y[2]).any()


def test_rows_do_not_depend_on_their_company():
    x, *rest = problem("int4", 128, 48, 9, 32)
    for act in (None, "int8"):
        together = np.asarray(matmul(x, *rest, 48, act))
        for row in (3, 8):
            # Float: one row alone takes another path, which sums each group by itself.
            alone = np.asarray(matmul(x[[row] * 5], *rest, 48, act))
            np.testing.assert_array_equal(alone, together[[row] * 5])


def test_empty_batches_and_operands_that_do_not_fit():
    x, words, scale, _, codes = problem("int4", 64, 16, 2, 32)
    assert matmul(x[:0], words, scale, None, codes, 16, "int8").shape == (0, 16)
    bad = [
        (x[:, :32], words, scale, None),
        (x, (words[0][:4],), scale, None),
        (x, words, scale[:1], None),
        (x, words, scale, np.zeros((1, 16), np.uint8)),
    ]
    for args in bad:
        with pytest.raises(ValueError, match=r"CPU kernels: (words|scales|zero points)"):
            kernels_cpu.matmul(*args, codes=codes, n=16)


def test_an_instruction_set_that_the_machine_has_not_is_an_error():
    x, words, scale, _, codes = problem("int4", 64, 16, 2, 32)
    with pytest.raises(jax.errors.JaxRuntimeError, match="no instruction set sse9"):
        jax.block_until_ready(
            kernels_cpu.matmul(x, words, scale, None, codes=codes, n=16, instructions="sse9")
        )


def test_panels_are_the_words_in_another_order():
    plane = jnp.arange(3 * 20, dtype=jnp.int32).reshape(3, 20)
    panels = kernels_cpu.panels(plane)
    assert panels.shape == (2, 3, 16)
    np.testing.assert_array_equal(panels[1, :, :4], plane[:, 16:])
    np.testing.assert_array_equal(kernels_cpu.unpanels(panels, 20), plane)
