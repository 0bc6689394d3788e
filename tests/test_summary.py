"""The table of layers: its numbers are those of the arrays that it stands for."""

import jax
import numpy as np
import pytest
from flax import nnx

import lowbit_jax as lb
from lowbit_jax.summary import Row, Summary

CONFIG = lb.models.DecoderConfig(
    vocab=24, dim=32, layers=2, heads=2, kv_heads=1, ffn_dim=64, max_length=8, qkv_bias=True
)


def decoder(recipe=None, *, packed=False, **changes):
    config = lb.models.DecoderConfig(**{**vars(CONFIG), **changes})
    model = lb.models.Decoder(config, rngs=nnx.Rngs(0))
    model = lb.quantize_model(model, recipe) if recipe else model
    return lb.pack_model(model) if packed else model


def abstract(*args, **kwargs):
    return nnx.eval_shape(lambda: decoder(*args, **kwargs))


def nbytes(model):
    return sum(np.prod(x.shape) * x.dtype.itemsize for x in jax.tree.leaves(nnx.state(model)))


MIXED = lb.Recipe(
    lb.Rule("embed", "w8a16"),
    lb.Rule(".*/(key|value)", None),
    lb.Rule(".*/(gate|up)", "w1_58a8"),
    lb.Rule(".*/down", "nvfp4"),
    lb.Rule("(?!head).*", "w3a16_g32_asym"),
    lb.Rule("head", lb.LayerScheme(input=lb.presets["w8a8"].input)),
)


@pytest.mark.parametrize("stacked", [False, True])
def test_bytes_are_those_of_the_packed_leaves_before_and_after_packing(stacked):
    packed = abstract(MIXED, packed=True, stacked=stacked)
    expected = nbytes(packed)
    assert lb.summary(packed).bytes == expected
    trained = lb.summary(abstract(MIXED, stacked=stacked))
    assert trained.bytes == expected
    plain = lb.summary(abstract(stacked=stacked))
    for table in (plain, trained, lb.summary(packed)):
        assert table.float_bytes == nbytes(abstract(stacked=stacked)) == 4 * table.parameters
    assert plain.bytes == plain.float_bytes
    assert plain.bits_per_weight == 32


def test_rows_name_what_every_layer_is():
    rows = {row.path: row for row in lb.summary(abstract(MIXED)).rows}
    up = rows["layers/1/mlp/up"]
    assert up == Row(
        path="layers/1/mlp/up",
        layer="QLinear",
        scheme="AbsMean ternary per tensor, input Absmax int8_narrow per token",
        bits=(32 * 64 * 2 + 32) / (32 * 64),  # two bits a weight and one float32 scale
        shape=(32, 64),
        float_bytes=4 * 32 * 64,
        bytes=32 * 64 // 4 + 4,
        weights=32 * 64,
        kernel_bytes=32 * 64 // 4 + 4,
    )
    # Three bits, and per 32 weights a float32 scale and a zero point of 8 bits.
    assert rows["layers/0/attention/query"].bits == 3 + 40 / 32
    assert (
        rows["layers/0/attention/query"].bytes
        == rows["layers/0/attention/query"].kernel_bytes + 128
    )
    # Four bits, an e4m3 scale per 16, a float32 factor for the matrix; and the range of the input.
    down = rows["layers/0/mlp/down"]
    assert down.bits == 4 + 8 / 16 + 32 / (64 * 32)
    assert down.bytes == down.kernel_bytes + 4
    assert rows["embed"].shape == (24, 32)
    assert rows["head"].weights == rows["head"].kernel_bytes == 0
    assert (rows["head"].layer, rows["head"].bits) == ("QLinear", 32)
    assert rows["layers/0/attention/key"].scheme == "float"
    assert rows["norm"].layer == "RMSNorm"


def test_bits_count_scales_and_padding():
    def bits(recipe, k, n):
        layer = nnx.eval_shape(
            lambda: lb.quantize_model(nnx.Linear(k, n, rngs=nnx.Rngs(0)), recipe)
        )
        return lb.summary(layer).bits_per_weight

    assert bits("w1_58a16", 128, 64) == 2 + 32 / (128 * 64)
    assert bits("w1_58a16", 129, 64) == (2 * 160 * 64 + 32) / (129 * 64)  # K padded to 160
    assert bits("w4a16_g128", 256, 8) == 4 + 32 / 128


def test_stacked_layers_are_one_row_with_the_leading_axis():
    rows = {
        row.path: row for row in lb.summary(abstract("w1_58a16", packed=True, stacked=True)).rows
    }
    assert rows["layers/mlp/up"].shape == (2, 32, 64)
    assert rows["layers/mlp/up"].bits == 2 + 32 / (32 * 64)


def test_a_bfloat16_parameter_is_counted_as_it_is_stored():
    layer = nnx.eval_shape(lambda: nnx.Linear(8, 4, param_dtype="bfloat16", rngs=nnx.Rngs(0)))
    (row,) = lb.summary(layer).rows
    assert (row.bits, row.bytes, row.float_bytes) == (16, 2 * 36, 4 * 36)


def test_a_shared_layer_comes_once():
    def make():
        layer = nnx.Linear(8, 4, rngs=nnx.Rngs(0))
        return nnx.List([layer, layer])

    assert [row.path for row in lb.summary(nnx.eval_shape(make)).rows] == ["0"]


def test_it_prints_a_table_that_ends_with_what_stayed_float():
    text = str(lb.summary(abstract("w4a16")))
    lines = text.splitlines()
    assert lines[0].split() == [
        "path",
        "layer",
        "scheme",
        "bits",
        "shape",
        "bytes",
        "before",
        "after",
    ]
    assert any(
        line.split()
        == [
            "layers/0/mlp/up",
            "QLinear",
            "Absmax",
            "int4",
            "per",
            "channel",
            "5",
            "32x64",
            "8,192",
            "1,280",
        ]
        for line in lines
    )
    assert "weights quantized to" in lines[-2]
    assert "times smaller than float32" in lines[-2]
    assert lines[-1].startswith("Float: embed, head, layers/0/attention_norm")
    assert len({len(line) for line in lines[2:4]}) == 1
    assert "Nothing stayed float." in str(
        Summary(tuple(r for r in lb.summary(abstract("w4a16")).rows if r.weights))
    )
