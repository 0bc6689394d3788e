"""The Hopper kernel in the GPU interpreter, which looks for races, against float64."""

import dataclasses
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.mosaic import gpu as mosaic

import kernels_pallas
from kernels_pallas import GpuConfig, Problem, reference
from kernels_pallas.gpu import joined
from kernels_pallas.gpu import plan as kernel
from kernels_pallas.gpu.layout import chunked
from kernels_pallas.testing import FORMATS, assert_close, interpreting, operands, problem

# Every kind of width, act, group and number of rows once; K and N with and without padding; weights
# made one by one, in pairs and by four, with and without zero points.
CASES = [
    ("binary", 1024, 128, 128, None, "bfloat16", 1),
    ("ternary", 272, 100, 272, "int8", "bfloat16", 64),
    ("int6", 512, 128, 128, None, "bfloat16", 9),
    ("int4", 256, 128, 128, "fp8", "bfloat16", 1),
    ("int4", 256, 128, 32, None, "bfloat16", 2),
    ("int4", 512, 128, 128, "int8", "bfloat16", 9),
    ("int2_half", 512, 128, 128, "int8", "bfloat16", 1),
    ("int2_half", 512, 128, 64, None, "bfloat16", 1),
    ("uint4", 256, 128, 128, "int8", "bfloat16", 8),
    ("int3", 1024, 128, 128, "int8", "bfloat16", 1),
    ("int4", 272, 128, 272, None, "float32", 16),
    ("uint4", 256, 128, 128, None, "float16", 3),
    ("uint4", 256, 128, 32, "int8", "bfloat16", 2),
    ("nf4", 256, 128, 64, None, "bfloat16", 2),
    ("fp4", 128, 128, 16, None, "bfloat16", 8),
]


@pytest.fixture(autouse=True)
def hopper():
    """The interpreter and the lowering ask for the device; an abstract one answers."""
    with interpreting("mosaic_gpu"):
        yield


def interpreted(x, words, scale, zero_point, p, config=None):
    return kernels_pallas.matmul(
        x, words, scale, zero_point, problem=p, backend="mosaic_gpu", interpret=True, config=config
    )


@pytest.mark.parametrize(("fmt", "k", "n", "group", "act", "dtype", "m"), CASES)
def test_product_is_within_the_bound_of_float64(fmt, k, n, group, act, dtype, m):
    p = problem(fmt, k, n, group, act, dtype)
    x, words, *rest = operands(p, m)
    prepared = kernels_pallas.prepare(words, p, "mosaic_gpu")
    assert_close(interpreted(x, prepared, *rest, p), x, words, *rest, p)


def test_split_k_with_more_tiles_than_stages_is_the_sum_of_its_parts():
    """Two blocks along K of three tiles each through two stages, two along N, one group in all."""
    p = problem("int4", 1536, 136, 1536)
    x, words, scale, _ = operands(p, m=2)
    config = GpuConfig(bm=8, chunk=32, stages=2, split_k=2)
    assert_close(interpreted(x, words, scale, None, p, config), x, words, scale, None, p)


def test_blocks_that_stay_compute_every_output_tile():
    """Six output tiles for four blocks: two of them take two, through two stages, in turn."""
    p = problem("int4", 512, 384, 128)
    x, words, scale, _ = operands(p, m=20)
    config = GpuConfig(bm=16, chunk=32, stages=2, split_k=1, blocks=4)
    assert_close(interpreted(x, words, scale, None, p, config), x, words, scale, None, p)


def test_groups_longer_than_a_tile_take_their_own_scale():
    p = problem("int4", 1024, 128, 512)
    x, words, scale, _ = operands(p, m=1)
    assert_close(interpreted(x, words, scale, None, p), x, words, scale, None, p)


@pytest.mark.filterwarnings("ignore:invalid value encountered in matmul:RuntimeWarning")
def test_what_is_not_finite_reaches_its_row_and_no_other():
    p = problem("int4", 256, 128, 256)
    x, words, scale, _ = operands(p, m=3)
    x = x.at[0, 5].set(jnp.inf).at[2, 7].set(jnp.nan)
    got = interpreted(x, words, scale, None, p)
    want, _ = reference.matmul64(x, words, scale, None, p)
    np.testing.assert_array_equal(np.isnan(got), np.isnan(want))
    np.testing.assert_array_equal(np.isinf(got), np.isinf(want))


@pytest.mark.parametrize("fmt", ["binary", "ternary", "int3", "int4", "uint8"])
def test_restore_undoes_prepare(fmt):
    p = problem(fmt, 96, 8, 96)
    _, words, *_ = operands(p, m=1)
    prepared = kernels_pallas.prepare(words, p, "mosaic_gpu")
    jax.tree.map(
        np.testing.assert_array_equal, kernels_pallas.restore(prepared, p, "mosaic_gpu"), words
    )


def test_fields_of_prepared_words_are_a_chunk_apart():
    p = problem("int4", 512, 128, 512)
    _, words, *_ = operands(p, m=1)
    codes = reference.codes(words, p)
    (plane,) = chunked(words, p, chunk=32).planes
    assert plane.shape == (2, 1, 128, 32)  # tiles of 8 * 32 elements, blocks of words, N, chunk
    tile, n, j = 1, 77, 5
    bits = (0, 16, 8, 24, 4, 20, 12, 28)  # two neighbours 16 bits apart, four in the four bytes
    fields = [int(plane[tile, 0, n, j]) >> bit & 15 for bit in bits]
    assert fields == [int(codes[256 * tile + 32 * f + j, n]) for f in range(8)]


def held(layout, shape):
    """Rows and columns by register, warp, lane and place in the register; see Mosaic's layouts."""
    tiled = layout.tiling.tile_shape(shape)
    return np.moveaxis(
        [layout.tiling.untile_indices(index) for index in np.ndindex(*tiled)], 1, 0
    ).reshape(2, *tiled)


@pytest.mark.parametrize(("lanes", "dtype"), [(2, np.uint16), (4, np.uint8)])
def test_a_thread_holds_the_words_of_its_weights(lanes, dtype):
    """That parting registers on the device is the transposition that the interpreter makes."""
    chunk = 16
    numbers = np.arange(chunk * lanes, dtype=dtype).reshape(chunk, lanes)
    words = jnp.asarray(np.broadcast_to(numbers.view(np.int32).ravel(), (64, chunk)))
    parted = np.asarray(joined._transposed(words, jnp.dtype(dtype)))
    weights = mosaic.WGMMA_LAYOUT_8BIT if lanes == 4 else mosaic.WGMMA_LAYOUT
    of_words, of_weights = held(mosaic.WGMMA_LAYOUT, (64, chunk)), held(weights, parted.shape)
    for c, b, lane in itertools.product(range(chunk // 8), range(2), range(lanes)):
        rows, columns = of_words[:, 0, c, ..., b]
        weight_rows, weight_columns = of_weights[:, 0, 2 * c + b, ..., lane]
        np.testing.assert_array_equal(weight_rows, rows)
        np.testing.assert_array_equal(parted[rows, weight_columns], columns * lanes + lane)


REFUSED = [
    (problem("int4", 192, 8, 96), "groups of 96 do not fit"),
    (problem("int4", 64, 8, 8), "groups of 8 do not fit"),
    (problem("fp4", 64, 8, 16, "int8"), "steps span 32 elements"),
    (problem("nf4", 64, 8, 64, "int8"), "not integers"),
    (problem("uint8", 64, 8, 64, "int8"), "leave the range of int8"),
    (problem("int8", 64, 8, 64, "fp8"), "not exact in float8"),
]


@pytest.mark.parametrize(("p", "reason"), REFUSED)
def test_what_is_not_computed_is_refused_with_the_reason(p, reason):
    assert reason in (kernels_pallas.supported(p, "mosaic_gpu") or "")


def test_tiles_that_do_not_fit_the_problem_are_errors():
    p = problem("int4", 512, 128, 128)
    x, words, scale, _ = operands(p, m=1)
    good = GpuConfig(bm=8, chunk=32, stages=2, split_k=1)
    prepared = kernels_pallas.prepare(words, p, "mosaic_gpu")
    for change, message in (
        ({"split_k": 3}, "split_k of 3 does not divide 2 tiles"),
        ({"chunk": 16}, "words of chunk 32, tiles of chunk 16"),
        ({"blocks": 4, "split_k": 2}, r"blocks that stay \(4\) and split_k of 2"),
        ({"decode": "tmem"}, "'smem' or 'registers', not 'tmem'"),
    ):
        with pytest.raises(ValueError, match=message):
            interpreted(x, prepared, scale, None, p, dataclasses.replace(good, **change))
    q = problem("nf4", 512, 128, 128)
    with pytest.raises(NotImplementedError, match=r"affine levels.*Use decode='smem'"):
        interpreted(x, words, scale, None, q, dataclasses.replace(good, decode="registers"))


def test_heuristic_tiles_fit_shared_memory_and_divide_k():
    formats = (FORMATS[name] for name in ("binary", "int3", "int4", "int7", "int8", "nf4"))
    shapes = ((64, 8), (4096, 4096), (11008, 4096), (14336, 4096))
    for fmt, (k, n), m in itertools.product(formats, shapes, (1, 9, 64, 4096)):
        p = Problem(**fmt, k=k, n=n, group=k)
        config = kernel.heuristic(p, m)
        assert kernel.shared_bytes(p, config) <= 227 * 1024, (p, config)
        tile = kernel.tile(p, config.chunk)
        assert -(-k // tile) % config.split_k == 0, (p, config)


def test_weights_are_made_at_once_only_where_a_group_holds_them():
    assert joined.count(problem("int4", 512, 128, 64), 32) == 2
    assert joined.count(problem("uint4", 512, 128, 128, "int8"), 32) == 4
    assert "groups of 32 part" in joined.why_not(problem("int4", 512, 128, 32), 32)
    assert "groups of 64 part" in joined.why_not(problem("int4", 512, 128, 64, "int8"), 32)
    assert "up to 6 bits, not 8" in joined.why_not(problem("int8", 512, 128, 128), 32)
    assert "affine levels" in joined.why_not(problem("nf4", 512, 128, 128), 32)
    assert "16-bit or int8" in joined.why_not(problem("int4", 512, 128, 128, "fp8"), 32)
