"""What other programs call a decoder: the inverse of the configurations that we read.

A decoder is written as the plainest family that computes the same: Llama, Mistral (one window
everywhere), Qwen 2 (biases of query, key and value) or Qwen 3 (norms of query and key).
"""

from typing import Any

from lowbit_jax.models import DecoderConfig

_NEVER = {
    "sub_norm": False,
    "post_norm": False,
    "online": (),
    "attention_softcap": None,
    "logit_softcap": None,
    "embed_scale": 1.0,
    "local_rope_theta": None,
    "activation": "silu",
}


def family_for(config: DecoderConfig) -> str:
    """ "llama", "mistral", "qwen2" or "qwen3".

    Raises: NotImplementedError: None of them computes what the decoder does.
    """
    other = {n: v for n, v in _NEVER.items() if getattr(config, n) != v}
    if other:
        shown = ", ".join(f"{name}={getattr(config, name)!r}" for name in other)
        raise NotImplementedError(
            f"export: no family that is written here has {shown}. Written are Llama, Mistral, "
            "Qwen 2 and Qwen 3."
        )
    windows = set(config.windows or (0,))
    if config.query_scale not in (None, config.head_size**-0.5):
        raise NotImplementedError(f"export: query_scale={config.query_scale}; no family has it.")
    if len(windows) > 1 or (windows != {0} and (config.qkv_bias or config.qk_norm)):
        raise NotImplementedError(
            f"export: windows={config.windows} of a model that is not Mistral's kind."
        )
    if config.qkv_bias and config.qk_norm:
        raise NotImplementedError("export: qkv_bias with qk_norm; no family has both.")
    if config.qkv_bias or config.qk_norm:
        return "qwen2" if config.qkv_bias else "qwen3"
    return "llama" if windows == {0} else "mistral"


def linear_factor(config: DecoderConfig) -> float | None:
    """What all rotary positions are divided by, if it is one number; else None."""
    factors = set(config.rope_factors or (1.0,))
    return factors.pop() if len(factors) == 1 else None


def huggingface_config(config: DecoderConfig, dtype: str) -> dict[str, Any]:
    """config.json of transformers.

    Raises: NotImplementedError: No family computes what the decoder does.
    """
    family = family_for(config)
    factor = linear_factor(config)
    if factor is None:
        raise NotImplementedError(
            "export: rope_factors differ between frequencies, and config.json has only formulas "
            "for that. GGUF holds the factors themselves."
        )
    content: dict[str, Any] = {
        "architectures": [f"{family.capitalize()}ForCausalLM"],
        "model_type": family,
        "vocab_size": config.vocab,
        "hidden_size": config.dim,
        "num_hidden_layers": config.layers,
        "num_attention_heads": config.heads,
        "num_key_value_heads": config.kv_heads,
        "head_dim": config.head_size,
        "intermediate_size": config.ffn_dim,
        "max_position_embeddings": config.max_length,
        "rms_norm_eps": config.norm_eps,
        "rope_theta": config.rope_theta,
        "tie_word_embeddings": config.tied,
        "hidden_act": "silu",
        "torch_dtype": dtype,
    }
    if factor != 1:
        content["rope_scaling"] = {"rope_type": "linear", "factor": factor}
    if family == "mistral":
        content["sliding_window"] = config.window(0)
    if family.startswith("qwen"):
        content["use_sliding_window"] = False
    return content


def gguf_metadata(config: DecoderConfig) -> dict[str, Any]:
    """The metadata of a GGUF file that describe the architecture.

    Raises: NotImplementedError: No family computes what the decoder does.
    """
    family = family_for(config)
    name = "llama" if family == "mistral" else family
    fields: dict[str, Any] = {
        "context_length": config.max_length,
        "embedding_length": config.dim,
        "block_count": config.layers,
        "feed_forward_length": config.ffn_dim,
        "vocab_size": config.vocab,
        "attention.head_count": config.heads,
        "attention.head_count_kv": config.kv_heads,
        "attention.key_length": config.head_size,
        "attention.value_length": config.head_size,
        "attention.layer_norm_rms_epsilon": config.norm_eps,
        "rope.dimension_count": config.head_size,
        "rope.freq_base": config.rope_theta,
    }
    if config.windows is not None and config.window(0):
        fields["attention.sliding_window"] = config.window(0)
    factor = linear_factor(config)
    if factor not in (None, 1):
        fields |= {"rope.scaling.type": "linear", "rope.scaling.factor": float(factor or 1)}
    return {"general.architecture": name} | {f"{name}.{key}": v for key, v in fields.items()}
