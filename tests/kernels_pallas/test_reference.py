"""The judge itself: packing, levels, and that the float32 form stays within the float64 bound."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import kernels_pallas
from kernels_pallas import Affine, Problem, Table, reference
from kernels_pallas.activations import quantize_rows, split
from kernels_pallas.problem import bfloat16_parts, integer_multiplier, level_values
from kernels_pallas.testing import FORMATS, NF4, assert_close, operands, problem


@pytest.mark.parametrize("fmt", ["int3", "uint4", "nf4"])
def test_plain_jnp_is_within_the_bound_of_float64(fmt):
    p = problem(fmt, k=96, n=24, group=32, dtype="float32")
    x, *arrays = operands(p, m=3)
    assert_close(reference.matmul(x, *arrays, p), x, *arrays, p)


@pytest.mark.parametrize("bits", range(1, 9))
def test_codes_of_packed_codes_are_the_codes(bits):
    p = Problem(bits=bits, levels=Affine(0), k=40, n=3, group=40)
    codes = np.random.default_rng(bits).integers(0, 2**bits, (40, 3)).astype(np.uint8)
    np.testing.assert_array_equal(reference.codes(reference.pack(codes, p), p), codes)


def test_words_hold_consecutive_codes_from_the_lowest_bits_up():
    p = Problem(bits=4, levels=Affine(0), k=8, n=1, group=8)
    (plane,) = reference.pack(np.arange(8, dtype=np.uint8)[:, None], p)
    assert [hex(int(word)) for word in plane.view(np.uint32)[:, 0]] == [
        "0x76543210",
        "0x0",
        "0x0",
        "0x0",
    ]


def test_three_bits_are_a_plane_of_two_and_a_plane_of_one():
    p = Problem(bits=3, levels=Affine(0), k=2, n=1, group=2)
    low, high = reference.pack(np.uint8([[5], [6]]), p)  # 0b101, 0b110
    assert int(low[0, 0]) == 0b10_01
    assert int(high[0, 0]) == 0b1_1


def test_a_table_of_24_bit_numbers_takes_three_bfloat16_numbers_and_integers_take_one():
    parts = {fmt: bfloat16_parts(problem(fmt, 32, 8, 32)) for fmt in ("nf4", "fp4", "uint8")}
    assert parts == {"nf4": 3, "fp4": 1, "uint8": 1}


def test_levels_become_integers_by_the_smallest_power_of_two():
    found = {fmt: integer_multiplier(problem(fmt, 32, 8, 32)) for fmt in FORMATS}
    assert found["int2_half"] == 2
    assert found["fp4"] == 2
    assert found["codebook3"] == 4
    assert found["int4"] == 1
    assert found["nf4"] is None
    assert list(level_values(problem("ternary", 32, 8, 32))) == [-1, 0, 1]


@pytest.mark.parametrize("dtype", ["float16", "float32"])
def test_parts_sum_to_the_number_and_keep_nan_and_infinity(dtype):
    x = np.random.default_rng(0).standard_normal((4, 64)).astype(dtype)
    x[0, :4] = [0.0, float(np.finfo(dtype).max), 1e-4, -3.14159]
    parts = split(jnp.asarray(x))
    np.testing.assert_array_equal(np.sum(np.asarray(parts, np.float64), 0), x.astype(np.float64))
    odd = split(jnp.asarray([[np.nan, np.inf, -np.inf]], dtype)).astype(jnp.float32)
    np.testing.assert_array_equal(np.sum(np.asarray(odd), 0), [[np.nan, np.inf, -np.inf]])


@pytest.mark.parametrize(("act", "largest", "ulp"), [("int8", 127, 1 / 254), ("fp8", 448, 2**-4)])
def test_rows_are_rounded_to_the_nearest_of_eight_bits(act, largest, ulp):
    x = jnp.asarray(
        np.random.default_rng(0).standard_normal((3, 50)) * [[1], [0], [1e6]], jnp.float32
    )
    codes, scale = quantize_rows(x, act)
    assert float(jnp.max(jnp.abs(codes.astype(jnp.float32)))) == largest
    np.testing.assert_array_equal(scale[1], 1.0)
    # int8: half a step of absmax / 127; e4m3: half of 2**-3 of the number itself, at most absmax.
    error = np.abs(np.asarray(codes, np.float64) * np.asarray(scale, np.float64) - np.asarray(x))
    absmax = np.max(np.abs(np.asarray(x)), axis=1, keepdims=True)
    assert np.all(error <= ulp * absmax * (1 + 1e-6))


def test_a_row_that_is_not_finite_has_a_scale_of_nan_and_codes_of_zero():
    codes, scale = quantize_rows(jnp.asarray([[1.0, np.inf], [np.nan, 1.0], [1.0, 2.0]]), "int8")
    np.testing.assert_array_equal(np.isnan(scale[:, 0]), [True, True, False])
    np.testing.assert_array_equal(codes[:2], 0)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"bits": 9}, "1 to 8 bits, not 9"),
        ({"group": 24}, r"64 = 2 \* 24 \+ 16"),
        ({"group": 0}, "groups of 0"),
        ({"n": 0}, "64 x 0 is empty"),
        ({"act": "int4"}, "'int4'"),
        ({"x_dtype": "float64"}, "not float64"),
        ({"levels": Table(NF4[:8])}, "8 entries"),
        ({"levels": Affine(0, count=17)}, "17 codes do not fit 4 bits"),
    ],
)
def test_a_problem_that_cannot_be_says_why(fields, message):
    good = {"bits": 4, "levels": Affine(-8), "k": 64, "n": 8, "group": 32}
    with pytest.raises(ValueError, match=message):
        Problem(**{**good, **fields})


@pytest.mark.parametrize("backend", ["mosaic_gpu", "mosaic_tpu"])
@pytest.mark.parametrize("fmt", FORMATS)
def test_words_are_prepared_alike_for_all_activations(fmt, backend):
    p = problem(fmt, 256, 128, 128)
    _, words, *_ = operands(p, m=1)
    acts = [dataclasses.replace(p, act=act) for act in (None, "int8", "fp8")]
    without, *others = (
        kernels_pallas.prepare(words, q, backend)
        for q in acts
        if not kernels_pallas.supported(q, backend)
    )
    for other in others:
        jax.tree.map(np.testing.assert_array_equal, other, without)
