"""Decode attention over packed caches in both interpreters (the GPU's looks for races)."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import kernels_pallas
from kernels_pallas import Attention
from kernels_pallas.attention import merge, reference64
from kernels_pallas.testing import interpreting

BACKENDS = ("mosaic_gpu", "mosaic_tpu")


def cache(attention, batch, capacity, seed):
    """Words of random codes (e4m3: finite ones) and scales that leave the levels about 1 large."""
    rng = np.random.default_rng(seed)
    shape = (batch, capacity, attention.kv_heads, attention.words)
    words = rng.integers(0, 2**32, shape, dtype=np.uint64).astype(np.uint32)
    largest = {"int8": 128, "int4": 8, "fp8": 448}[attention.fmt]
    if attention.fmt == "fp8":
        words &= np.uint32(0xFBFBFBFB)
    scale = rng.uniform(0.5, 1.5, shape[:3]) / largest
    return jnp.asarray(words.view(np.int32)), jnp.asarray(scale, jnp.float16)


# Every format, dtype, soft cap, ends inside and at the edges of a step, parts without positions.
CASES = [
    ("int8", 64, 2, 6, "bfloat16", 320, (3, 190), 2, None),
    ("int4", 128, 1, 1, "float32", 64, (0, 64), 1, 5.0),
    ("fp8", 56, 2, 2, "float16", 192, (70, 71), 3, None),
]


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(
    ("fmt", "width", "kv", "heads", "dtype", "s", "seen", "parts", "cap"), CASES
)
def test_attention_is_that_of_float64(backend, fmt, width, kv, heads, dtype, s, seen, parts, cap):
    attention = Attention(
        fmt=fmt, kv_heads=kv, heads=heads, head_dim=width, scale=width**-0.5, softcap=cap
    )
    query = np.random.default_rng(s).standard_normal((2, heads, width))
    query = jnp.asarray(query, dtype)
    keys, values = cache(attention, 2, s, 1), cache(attention, 2, s, 2)
    # What is not seen may be anything, as behind the end of a cache that is not full.
    unseen = (np.arange(s) < seen[0]) | (np.arange(s) >= seen[1])
    values = (values[0], jnp.where(unseen[None, :, None], jnp.nan, values[1]))
    with interpreting(backend):
        got = kernels_pallas.attend(
            query, keys, values, *seen,
            attention=attention, backend=backend, splits=parts, interpret=True,
        )  # fmt: skip
    want = reference64(query, keys, values, *seen, attention)
    assert got.dtype == query.dtype
    # Weights of sum 1, rounded to bfloat16 where the query is, times values of at most 1.5; exp in
    # float32 of scores of up to 16, whose own roundings it carries over; and the result's rounding.
    unit = float(jnp.finfo(dtype).eps)
    bound = 1.5 * (2.0**-8 if dtype == "bfloat16" else 2.0**-19) + unit * np.abs(want)
    assert np.all(np.abs(np.asarray(got, np.float64) - want) <= bound)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("fmt", ["int8", "fp8", "int4"])
def test_every_format_is_lowered(backend, fmt):
    attention = Attention(fmt=fmt, kv_heads=8, heads=32, head_dim=128, scale=0.1)
    words = jax.ShapeDtypeStruct((1, 4096, 8, attention.words), jnp.int32)
    scale = jax.ShapeDtypeStruct((1, 4096, 8), jnp.float16)

    def run(query, stop, *rows):
        return kernels_pallas.attend(
            query, rows[:2], rows[2:], 0, stop, attention=attention, backend=backend
        )

    arguments = (
        jax.ShapeDtypeStruct((1, 32, 128), jnp.bfloat16),
        jax.ShapeDtypeStruct((), jnp.int32),
        *(words, scale, words, scale),
    )
    gpu = backend == "mosaic_gpu"
    with interpreting(backend):
        traced = jax.jit(run).trace(*arguments)
        text = traced.lower(lowering_platforms=("cuda" if gpu else "tpu",)).as_text()
    assert ("mosaic_gpu" if gpu else "tpu_custom_call") in text


def test_merged_parts_are_one_softmax_and_empty_parts_add_nothing():
    rng = np.random.default_rng(0)
    scores, values = rng.normal(size=(1, 3, 4)), rng.normal(size=(1, 3, 4, 5))
    largest = scores.max(axis=2)
    weights = np.exp(scores - largest[..., None])
    sums = np.einsum("bpk,bpkd->bpd", weights, values)
    parts = [sums, largest, weights.sum(axis=2)]
    for part, empty in zip(parts, (0.0, -1e30, 0.0), strict=True):
        part[:, 1] = empty
    kept = np.exp(scores[:, [0, 2]])
    want = np.einsum("bpk,bpkd->bd", kept, values[:, [0, 2]]) / kept.sum()
    got = merge(*(jnp.asarray(part, jnp.float32) for part in parts))
    np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-6)


def test_what_cannot_be_says_why():
    good = {"fmt": "int8", "kv_heads": 2, "heads": 4, "head_dim": 64, "scale": 1.0}
    for change, message in (
        ({"fmt": "int2"}, "'int2'"),
        ({"heads": 3}, "3 heads over 2 key heads"),
        ({"head_dim": 0}, "heads of 0 features"),
    ):
        with pytest.raises(ValueError, match=message):
            Attention(**{**good, **change})
    attention = Attention(**good)
    keys = cache(attention, 1, 100, 0)
    query = jnp.zeros((1, 4, 64))
    call = {"attention": attention, "backend": "mosaic_gpu"}
    with pytest.raises(NotImplementedError, match="100 positions is no multiple of 64"):
        kernels_pallas.attend(query, keys, keys, 0, 1, **call)
    with pytest.raises(ValueError, match=r"query is float32\[1, 3, 64\]"):
        kernels_pallas.attend(query[:, :3], keys, keys, 0, 1, **call)
    with pytest.raises(ValueError, match=r"scales \(1, 100, 1\)"):
        kernels_pallas.attend(query, keys, (keys[0], keys[1][..., :1]), 0, 1, **call)
    with pytest.raises(ValueError, match="0 parts"):
        kernels_pallas.attend(query, keys, keys, 0, 1, splits=0, **call)
    many = Attention(**{**good, "kv_heads": 1, "heads": 65})
    assert "65 query heads" in kernels_pallas.attend_unsupported(many, 64, "mosaic_gpu")
    narrow = Attention(**{**good, "fmt": "int4"})
    assert "take 8 words" in kernels_pallas.attend_unsupported(narrow, 64, "mosaic_gpu")
    wide = Attention(**{**good, "kv_heads": 80, "heads": 80})
    assert "80 key heads" in kernels_pallas.attend_unsupported(wide, 64, "mosaic_tpu")
