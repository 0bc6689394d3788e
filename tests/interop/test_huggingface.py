"""A folder as transformers writes it becomes the model that it is of."""

import dataclasses
import json

import ml_dtypes
import numpy as np
import pytest

from lowbit_jax.interop import load_model
from lowbit_jax.interop.rotary import llama3_factors
from lowbit_jax.models import DecoderConfig

BASE = DecoderConfig(
    vocab=11,
    dim=8,
    layers=2,
    heads=2,
    kv_heads=1,
    ffn_dim=12,
    max_length=64,
    norm_eps=1e-6,
    rope_theta=500.0,
)
COMMON = {
    "vocab_size": 11,
    "hidden_size": 8,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "intermediate_size": 12,
    "max_position_embeddings": 64,
    "rms_norm_eps": 1e-6,
    "rope_theta": 500.0,
    "tie_word_embeddings": False,
}
GEMMA = dataclasses.replace(
    BASE,
    head_dim=6,
    tied=True,
    activation="gelu_tanh",
    embed_scale=8**0.5,
    post_norm=True,
    query_scale=16**-0.5,
)
COMMON_GEMMA = {key: v for key, v in COMMON.items() if key != "tie_word_embeddings"} | {
    "head_dim": 6,
    "query_pre_attn_scalar": 16,
    "hidden_activation": "gelu_pytorch_tanh",
}
LLAMA3 = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}
FACTORS = llama3_factors(4, 500.0, factor=8.0, low=1.0, high=4.0, original=32)
# class, what its config.json adds, what that is for us
CASES = {
    "llama2": ("LlamaForCausalLM", {"hidden_act": "silu", "pretraining_tp": 1}, BASE),
    "llama3": (
        "LlamaForCausalLM",
        {"rope_scaling": LLAMA3, "attention_bias": False, "head_dim": None},
        dataclasses.replace(BASE, rope_factors=FACTORS),
    ),
    "version 5": (
        "LlamaForCausalLM",
        {"rope_theta": None, "rope_parameters": {"rope_theta": 500.0} | LLAMA3},
        dataclasses.replace(BASE, rope_factors=FACTORS),
    ),
    "mistral": (
        "MistralForCausalLM",
        {"sliding_window": 4},
        dataclasses.replace(BASE, windows=(4, 4)),
    ),
    "mistral without": ("MistralForCausalLM", {"sliding_window": None}, BASE),
    "qwen2": (
        "Qwen2ForCausalLM",
        {"use_sliding_window": False, "sliding_window": 32, "tie_word_embeddings": True},
        dataclasses.replace(BASE, qkv_bias=True, tied=True),
    ),
    "qwen2 with": (
        "Qwen2ForCausalLM",
        {"use_sliding_window": True, "sliding_window": 32, "max_window_layers": 1},
        dataclasses.replace(BASE, qkv_bias=True, windows=(0, 32)),
    ),
    "qwen3": (
        "Qwen3ForCausalLM",
        {"head_dim": 6, "rope_scaling": {"type": "linear", "factor": 2}},
        dataclasses.replace(BASE, qk_norm=True, head_dim=6, rope_factors=(2.0,) * 3),
    ),
    "gemma2": (
        "Gemma2ForCausalLM",
        {"sliding_window": 16},
        dataclasses.replace(GEMMA, attention_softcap=50.0, logit_softcap=30.0, windows=(16, 0)),
    ),
    "gemma3": (
        "Gemma3ForCausalLM",
        {
            "sliding_window": 16,
            "sliding_window_pattern": 2,
            "final_logit_softcapping": None,
            "rope_scaling": {"rope_type": "linear", "factor": 8.0},
        },
        dataclasses.replace(
            GEMMA, qk_norm=True, windows=(16, 0), local_rope_theta=1e4, rope_factors=(8.0,) * 3
        ),
    ),
    "gemma3, version 5": (
        "Gemma3ForCausalLM",
        {
            "sliding_window": 16,
            "layer_types": ["full_attention", "sliding_attention"],
            "rope_parameters": {
                "full_attention": {"rope_type": "default", "rope_theta": 500.0},
                "sliding_attention": {"rope_type": "default", "rope_theta": 100.0},
            },
        },
        dataclasses.replace(GEMMA, qk_norm=True, windows=(0, 16), local_rope_theta=100.0),
    ),
}
NAMES = {
    "embed/embedding": "model.embed_tokens.weight",
    "norm/scale": "model.norm.weight",
    "head/kernel": "lm_head.weight",
    "attention_norm/scale": "input_layernorm.weight",
    **{
        f"attention/{a}/kernel": f"self_attn.{b}_proj.weight"
        for a, b in zip(("query", "key", "value", "out"), "qkvo", strict=True)
    },
    **{f"attention/{a}/bias": f"self_attn.{a[0]}_proj.bias" for a in ("query", "key", "value")},
    **{f"attention/{a}_norm/scale": f"self_attn.{a[0]}_norm.weight" for a in ("query", "key")},
    **{f"mlp/{a}/kernel": f"mlp.{a}_proj.weight" for a in ("gate", "up", "down")},
    "mlp_norm/scale": "post_attention_layernorm.weight",
}
GEMMA_NAMES = NAMES | {
    "attention_post_norm/scale": "post_attention_layernorm.weight",
    "mlp_norm/scale": "pre_feedforward_layernorm.weight",
    "mlp_post_norm/scale": "post_feedforward_layernorm.weight",
}


@pytest.fixture
def write(files, tmp_path):
    """Writes a folder; returns the parameters that have to come out of it."""

    def write(case: str, dtype=np.float32, shards=1, drop=(), tensors=(), **changes):
        name, own, config = CASES[case]
        gemma = name.startswith("Gemma")
        common = COMMON_GEMMA if gemma else COMMON
        content = {"architectures": [name]} | common | own | changes
        (tmp_path / "config.json").write_text(json.dumps(content))
        stored, leaves = {}, files.random_leaves(config)
        for path, value in leaves.items():
            number = path.split("/")[1] if path.startswith("layers/") else None
            known = (GEMMA_NAMES if gemma else NAMES)[path.split("/", 2)[2] if number else path]
            known = f"model.layers.{number}.{known}" if number else known
            value = value.T if path.endswith("kernel") else value
            value = value - np.float32(1) if gemma and path.endswith("scale") else value
            stored[known] = np.ascontiguousarray(value.astype(dtype))
            value = stored[known].astype(np.float32)
            value = value + np.float32(1) if gemma and path.endswith("scale") else value
            leaves[path] = value.T if path.endswith("kernel") else value
        stored = {n: t for n, t in stored.items() if n not in drop} | dict(tensors)
        parts = [dict(list(stored.items())[i::shards]) for i in range(shards)]
        if shards == 1:
            (tmp_path / "model.safetensors").write_bytes(files.safetensors(stored))
            return leaves
        placed = {}
        for i, part in enumerate(parts):
            shard = f"model-{i + 1:05}-of-{shards:05}.safetensors"
            (tmp_path / shard).write_bytes(files.safetensors(part))
            placed |= dict.fromkeys(part, shard)
        index = json.dumps({"weight_map": placed})
        (tmp_path / "model.safetensors.index.json").write_text(index)
        return leaves

    return write


def check(files, model, leaves) -> None:
    got = files.leaves_of(model)
    assert list(got) == list(leaves)
    for path, value in leaves.items():
        assert got[path].dtype == np.float32
        np.testing.assert_array_equal(got[path], value, err_msg=path)


@pytest.mark.parametrize("case", CASES)
def test_configuration_and_weights_come_back_bit_for_bit(files, write, tmp_path, case):
    leaves = write(case)
    loaded = load_model(tmp_path)
    assert loaded.model.config == CASES[case][2]
    check(files, loaded.model, leaves)
    assert loaded.tokenizer is None
    assert loaded.source["format"] == "huggingface"
    assert loaded.source["architecture"] == CASES[case][0]


@pytest.mark.parametrize("dtype", [np.float16, ml_dtypes.bfloat16])
@pytest.mark.parametrize("shards", [1, 3])
def test_narrow_types_and_shards_are_widened_exactly(files, write, tmp_path, dtype, shards):
    leaves = write("llama2", dtype=dtype, shards=shards)
    check(files, load_model(tmp_path).model, leaves)


def test_what_is_known_not_to_be_needed_may_be_there(files, write, tmp_path):
    head = np.zeros((11, 8), np.float32)
    buffer = {"model.layers.0.self_attn.rotary_emb.inv_freq": np.zeros(2, np.float32)}
    leaves = write("qwen2", tensors={"lm_head.weight": head} | buffer)
    check(files, load_model(tmp_path).model, leaves)


Q0 = "model.layers.0.self_attn.q_proj.weight"


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        (
            {"architectures": ["BertModel"]},
            NotImplementedError,
            r"'BertModel' .*'LlamaForCausalLM'",
        ),
        ({"architectures": None}, ValueError, r"'architectures' names no class"),
        (
            {"quantization_config": {"quant_method": "quip"}},
            NotImplementedError,
            r"quantization_config: quant_method is .quip., .*known are \[.gptq.",
        ),
        ({"attention_bias": True}, NotImplementedError, r"attention_bias is True"),
        ({"mlp_bias": True}, NotImplementedError, r"mlp_bias is True"),
        ({"hidden_act": "relu"}, NotImplementedError, r"hidden_act is 'relu'.*'silu'"),
        ({"partial_rotary_factor": 0.5}, NotImplementedError, r"partial_rotary_factor is 0.5"),
        ({"rope_scaling": {"type": "yarn"}}, NotImplementedError, r"rope_scaling: type is 'yarn'"),
        ({"rope_scaling": {"type": "linear"}}, ValueError, r"rope_scaling: factor is missing"),
        ({"rope_scaling": [1]}, ValueError, r"rope_scaling is \[1\], and not an object"),
        ({"hidden_size": None}, ValueError, r"hidden_size is missing"),
        ({"hidden_size": 2.0}, ValueError, r"hidden_size is 2.0, and not an integer"),
        ({"hidden_size": 16}, ValueError, r"model.embed_tokens.weight is \(11, 8\) and not"),
        ({"vocab_size": 2**62}, ValueError, r"vocab_size is 4611686018427387904"),
        ({"rms_norm_eps": 10**400}, ValueError, r"rms_norm_eps is 1000.* and not a finite number"),
        ({"num_hidden_layers": 10**9}, ValueError, r"says 1000000000 layers, and .* tensors of 2"),
        (
            {"head_dim": 2**40, "rope_scaling": {"type": "linear", "factor": 2}},
            ValueError,
            r"q_proj.weight is \(8, 8\) and not \(2199023255552, 8\)",
        ),
        (
            {"num_attention_heads": 2**50 + 1, "num_key_value_heads": 2},
            ValueError,
            r"not a multipl",
        ),
        ({"num_attention_heads": 3}, ValueError, r"dim=8 does not split into heads=3"),
        ({"drop": [Q0]}, ValueError, rf"1 tensors are missing .*: {Q0}"),
        ({"tensors": {"extra": np.zeros(1, np.float32)}}, ValueError, r"no parameter .*: extra"),
        ({"tensors": {Q0: np.zeros((8, 7), np.float32)}}, ValueError, rf"{Q0} is \(8, 7\) and"),
    ],
)
def test_a_folder_that_does_not_fit_is_named(write, tmp_path, changes, error, message):
    write("llama2", **changes)
    with pytest.raises(error, match=message):
        load_model(tmp_path)


@pytest.mark.parametrize(
    ("kinds", "error"), [(["full_attention"], ValueError), (["chunked"] * 2, NotImplementedError)]
)
def test_kinds_of_layers_that_do_not_fit_are_named(write, tmp_path, kinds, error):
    write("mistral", layer_types=kinds)
    with pytest.raises(error, match="layer_types"):
        load_model(tmp_path)


@pytest.mark.parametrize("content", ["{", "[]", "[" * 10**5])
def test_a_configuration_that_is_no_json_object_is_named(tmp_path, content):
    (tmp_path / "config.json").write_text(content)
    with pytest.raises(ValueError, match=r"config.json: is not (a )?JSON"):
        load_model(tmp_path)
