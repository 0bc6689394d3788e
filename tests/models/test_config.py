"""A configuration that no model can have is refused by name and number."""

import dataclasses

import jax.numpy as jnp
import pytest

from lowbit_jax.models import CNNConfig, DecoderConfig, MLPConfig

GOOD = DecoderConfig(vocab=8, dim=12, layers=1, heads=6, kv_heads=3, ffn_dim=8, max_length=4)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"dim": 0}, r"dim=0 must be made of integers >= 1"),
        ({"layers": True}, r"layers=True"),
        ({"kv_heads": 4}, r"heads=6 is not a multiple of kv_heads=4.*fit: \[1, 2, 3, 6\]"),
        ({"dim": 14}, r"dim=14 does not split into heads=6 \(14 = 2 \* 6 \+ 2\)"),
        ({"head_dim": 0}, r"head_dim=0"),
        ({"head_dim": 3}, r"heads of width 3 cannot be rotated"),
        ({"norm_eps": 0.0}, r"norm_eps=0.0 must be a number > 0"),
        ({"rope_theta": float("nan")}, r"rope_theta=nan"),
        ({"embed_scale": 0}, r"embed_scale=0 must be a number > 0"),
        ({"attention_softcap": -1.0}, r"attention_softcap=-1.0"),
        ({"activation": "relu"}, r"'relu' is not known. Known: \['silu', 'gelu_tanh'\]"),
        ({"windows": (1, 2)}, r"windows=\(1, 2\) must be a tuple of 1 numbers"),
        ({"windows": (-1,)}, r"windows=\(-1,\) must be made of integers >= 0"),
        ({"rope_factors": (1.0, 2.0)}, r"rope_factors=\(1.0, 2.0\) must be a tuple of 1 numbers"),
        ({"rope_factors": (0.0,)}, r"rope_factors=0.0"),
        ({"dtype": "float16"}, r"'float16' is not known. Known: \['float32', 'bfloat16'\]"),
    ],
    ids=str,
)
def test_a_wrong_field_is_named_with_its_value(change, message):
    with pytest.raises(ValueError, match=message):
        dataclasses.replace(GOOD, **change)


@pytest.mark.parametrize(
    ("field", "make"),
    [
        ("vocab", lambda: dataclasses.replace(GOOD, vocab="256")),
        ("tied", lambda: dataclasses.replace(GOOD, tied=1)),
        ("hidden", lambda: MLPConfig(4, [8], 2)),
        ("hidden", lambda: MLPConfig(4, 8.0, 2)),
    ],
)
def test_a_field_of_the_wrong_type_is_named(field, make):
    # A runtime type checker, where one is switched on, speaks first, with its own TypeError.
    with pytest.raises((ValueError, TypeError), match=field):
        make()


def test_width_of_a_head_follows_from_dim_unless_it_is_set():
    assert GOOD.head_size == 2
    assert dataclasses.replace(GOOD, head_dim=8).head_size == 8
    # dim need not split into heads where the head's width is given.
    assert dataclasses.replace(GOOD, dim=13, head_dim=8).head_size == 8


def test_dtype_names_the_type_that_is_computed_in():
    assert GOOD.compute_dtype == jnp.float32
    assert dataclasses.replace(GOOD, dtype="bfloat16").compute_dtype == jnp.bfloat16


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: MLPConfig(4, (8, 0), 2), r"MLPConfig: hidden=\(8, 0\)"),
        (lambda: CNNConfig(3, (), 2), r"channels=\(\) leaves no stage"),
        (lambda: CNNConfig(3, (4,), 2, kernel_size=0), r"CNNConfig: kernel_size=0"),
    ],
)
def test_small_models_refuse_wrong_sizes(make, message):
    with pytest.raises(ValueError, match=message):
        make()
