"""Folders of Hugging Face's transformers: config.json, safetensors and tokenizer.json.

A family is a row in `FAMILIES`: what it calls its tensors, and what its configuration says beyond
what all of them have. Defaults are those of transformers, for a config.json leaves out what equals
them.
"""

import dataclasses
import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Final

import numpy as np

from lowbit_jax.interop.fields import Fields
from lowbit_jax.interop.methods import Weights, open_tensors
from lowbit_jax.interop.packed import fill_packed
from lowbit_jax.interop.quantized import QuantizedTensors
from lowbit_jax.interop.rotary import linear_factors, llama3_factors
from lowbit_jax.interop.weights import (
    TensorSource,
    fill_decoder,
    require_layers,
    require_sizes,
)
from lowbit_jax.models import Decoder, DecoderConfig

CONFIG: Final = "config.json"
_LAYER: Final = r"model\.layers\.(\d+)\."
_BUFFERS: Final = r"model\.layers\.\d+\.self_attn\.rotary_emb\.inv_freq"
NAMES: Final = {
    "embed/embedding": "model.embed_tokens.weight",
    "norm/scale": "model.norm.weight",
    "head/kernel": "lm_head.weight",
    "layers/{}/attention_norm/scale": "model.layers.{}.input_layernorm.weight",
    **{
        f"layers/{{}}/attention/{ours}/{leaf}": f"model.layers.{{}}.self_attn.{theirs}.{end}"
        for ours, theirs in (("query", "q_proj"), ("key", "k_proj"), ("value", "v_proj"))
        for leaf, end in (("kernel", "weight"), ("bias", "bias"))
    },
    "layers/{}/attention/query_norm/scale": "model.layers.{}.self_attn.q_norm.weight",
    "layers/{}/attention/key_norm/scale": "model.layers.{}.self_attn.k_norm.weight",
    "layers/{}/attention/out/kernel": "model.layers.{}.self_attn.o_proj.weight",
    "layers/{}/mlp_norm/scale": "model.layers.{}.post_attention_layernorm.weight",
    "layers/{}/mlp/gate/kernel": "model.layers.{}.mlp.gate_proj.weight",
    "layers/{}/mlp/up/kernel": "model.layers.{}.mlp.up_proj.weight",
    "layers/{}/mlp/down/kernel": "model.layers.{}.mlp.down_proj.weight",
}
_GEMMA_NAMES: Final = NAMES | {
    "layers/{}/attention_post_norm/scale": "model.layers.{}.post_attention_layernorm.weight",
    "layers/{}/mlp_norm/scale": "model.layers.{}.pre_feedforward_layernorm.weight",
    "layers/{}/mlp_post_norm/scale": "model.layers.{}.post_feedforward_layernorm.weight",
}
_FULL, _SLIDING = "full_attention", "sliding_attention"


@dataclasses.dataclass(frozen=True)
class Family:
    """How the models of one class of transformers become a `Decoder`.

    options: Further fields of `DecoderConfig`, from the file and the configuration so far.
    names: Tensors by the paths of our parameters.
    defaults: Fields that config.json may leave out.
    norm_offset: Is added to the scales of the norms.
    """

    options: Callable[[Fields, DecoderConfig], dict[str, Any]]
    names: Mapping[str, str] = dataclasses.field(default_factory=lambda: NAMES)
    defaults: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    norm_offset: float = 0.0


def load_decoder(folder: Path, weights: Weights = "float") -> tuple[Decoder, str]:
    """The model in a folder and its architecture; what is not packed is float32.

    Raises:
        ValueError: Files are damaged, or do not belong together.
        NotImplementedError: An architecture or an option that is not known here.
    """
    fields = read_config(folder)
    name = architecture_of(fields)
    family, source = FAMILIES[name], open_tensors(folder, fields)
    config = decoder_config(fields, family, source)
    if isinstance(source, QuantizedTensors):
        source.drop_zero_biases(keep=r".*\.[qkv]_proj" if config.qkv_bias else "")

    def prepare(path: str, tensor: np.ndarray) -> np.ndarray:
        return tensor + np.float32(family.norm_offset) if path.endswith("scale") else tensor

    # Some files keep a head that is the embedding again, and older ones the rotary frequencies.
    unused = f"{_BUFFERS}|lm_head.weight" if config.tied else _BUFFERS
    if isinstance(source, QuantizedTensors) and weights == "packed":
        model = fill_packed(config, source, family.names, prepare=prepare, unused=unused)
    else:
        model = fill_decoder(config, source, family.names, prepare=prepare, unused=unused)
    return model, name


def read_config(folder: Path, name: str = CONFIG) -> Fields:
    """A JSON file of the folder. Raises: ValueError: It is no JSON object."""
    path = folder / name
    try:
        content = json.loads(path.read_bytes())
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path}: is not JSON ({error}).") from None
    if not isinstance(content, dict):
        raise ValueError(f"{path}: is not a JSON object.")
    return Fields(content, str(path))


def architecture_of(fields: Fields) -> str:
    """The class of transformers that a configuration names.

    Raises:
        ValueError: It names none.
        NotImplementedError: It is none that is known here.
    """
    match fields.values.get("architectures"):
        case [str(name), *_]:
            pass
        case _:
            raise ValueError(f"{fields.where}: 'architectures' names no class.")
    if name not in FAMILIES:
        raise NotImplementedError(
            f"{fields.where}: the architecture {name!r} is not supported. Supported: "
            f"{sorted(FAMILIES)}."
        )
    return name


def decoder_config(fields: Fields, family: Family, source: TensorSource) -> DecoderConfig:
    """The decoder's configuration, whose sizes are those of the tensors.

    Raises:
        ValueError: A field is missing or has a value that it cannot have.
        NotImplementedError: An option that the decoder does not have.
    """
    fields = Fields({**family.defaults, **fields.values}, fields.where)
    for name in ("attention_bias", "mlp_bias", "use_bidirectional_attention"):
        if fields.flag(name, False):
            fields.unsupported(name, "the decoder has no such layers")
    if fields.number("partial_rotary_factor", 1.0) != 1:
        fields.unsupported("partial_rotary_factor", "whole heads are rotated")
    require_layers(source, _LAYER, fields.integer("num_hidden_layers"))
    heads = fields.integer("num_attention_heads")
    base = DecoderConfig(
        vocab=fields.integer("vocab_size"),
        dim=fields.integer("hidden_size"),
        layers=fields.integer("num_hidden_layers"),
        heads=heads,
        kv_heads=fields.integer("num_key_value_heads", heads),
        ffn_dim=fields.integer("intermediate_size"),
        max_length=fields.integer("max_position_embeddings"),
        head_dim=fields.integer("head_dim", None),
        tied=fields.flag("tie_word_embeddings", False),
        norm_eps=fields.number("rms_norm_eps", 1e-6),
    )
    require_sizes(base, source, family.names)
    positions = _rotary(fields, base.head_size)
    return dataclasses.replace(base, **positions, **family.options(fields, base))


def _rotary(fields: Fields, head_size: int) -> dict[str, Any]:
    """Base and divisors of the frequencies, of all layers or of those without a window."""
    # Since version 5 of transformers one object holds all of it, or one object per kind of layer.
    scaling = fields.inner("rope_parameters" if fields.has("rope_parameters") else "rope_scaling")
    local = scaling.inner(_SLIDING) if scaling.has(_SLIDING) else scaling
    scaling = scaling.inner(_FULL) if scaling.has(_FULL) else scaling
    theta = scaling.number("rope_theta", None) or fields.number("rope_theta", 10000.0)
    values: dict[str, Any] = {"rope_theta": theta}
    if fields.has("rope_local_base_freq") or local is not scaling:
        values["local_rope_theta"] = local.number("rope_theta", None) or fields.number(
            "rope_local_base_freq", theta
        )
    kind = scaling.text("rope_type", None) or scaling.text("type", "default")
    if kind == "default":
        return values
    if kind == "linear":
        factors = linear_factors(scaling.number("factor"), head_size)
    elif kind == "llama3":
        factors = llama3_factors(
            head_size,
            theta,
            factor=scaling.number("factor"),
            low=scaling.number("low_freq_factor"),
            high=scaling.number("high_freq_factor"),
            original=scaling.integer("original_max_position_embeddings"),
        )
    else:
        scaling.unsupported(
            "rope_type" if scaling.has("rope_type") else "type", "no such stretching"
        )
    return values | {"rope_factors": factors}


def _activation(fields: Fields, name: str) -> str:
    known = {"silu": "silu", "gelu_pytorch_tanh": "gelu_tanh"}
    if fields.text(name) not in known:
        fields.unsupported(name, f"known are {list(known)}")
    return known[fields.text(name)]


def _windows(fields: Fields, config: DecoderConfig, slides: Callable[[int], bool]) -> Any:
    """Each layer's window: of those that config.json lists as sliding, or else that `slides`."""
    window = fields.integer("sliding_window", None)
    if window is None:
        return None
    kinds = fields.values.get("layer_types")
    if kinds is None:
        kinds = [_SLIDING if slides(i) else _FULL for i in range(config.layers)]
    if not isinstance(kinds, list) or len(kinds) != config.layers:
        raise ValueError(f"{fields.where}: layer_types is not a list of {config.layers} kinds.")
    for kind in kinds:
        if kind not in (_SLIDING, _FULL):
            fields.unsupported("layer_types", f"known are {_SLIDING} and {_FULL}")
    # A window as long as the longest context is none.
    window = window if window < config.max_length else 0
    windows = tuple(window if kind == _SLIDING else 0 for kind in kinds)
    return windows if any(windows) else None


def _llama(fields: Fields, config: DecoderConfig) -> dict[str, Any]:
    return {"activation": _activation(fields, "hidden_act")}


def _mistral(fields: Fields, config: DecoderConfig) -> dict[str, Any]:
    return _llama(fields, config) | {"windows": _windows(fields, config, lambda layer: True)}


def _qwen(**more: bool) -> Callable[[Fields, DecoderConfig], dict[str, Any]]:
    def options(fields: Fields, config: DecoderConfig) -> dict[str, Any]:
        windows = None
        if fields.flag("use_sliding_window", False):
            first = fields.integer("max_window_layers", 28)
            windows = _windows(fields, config, lambda layer: layer >= first)
        return _llama(fields, config) | {"windows": windows} | more

    return options


def _gemma(every: int, **more: Any) -> Callable[[Fields, DecoderConfig], dict[str, Any]]:
    def options(fields: Fields, config: DecoderConfig) -> dict[str, Any]:
        full = fields.integer("sliding_window_pattern", every)
        return {
            "activation": _activation(fields, "hidden_activation"),
            "embed_scale": config.dim**0.5,
            "post_norm": True,
            "query_scale": fields.integer("query_pre_attn_scalar") ** -0.5,
            "attention_softcap": fields.number("attn_logit_softcapping", None),
            "logit_softcap": fields.number("final_logit_softcapping", None),
            "windows": _windows(fields, config, lambda layer: bool((layer + 1) % full)),
            **more,
        }

    return options


_SILU: Final = {"hidden_act": "silu"}
_GEMMA: Final = {
    "hidden_activation": "gelu_pytorch_tanh",
    "tie_word_embeddings": True,
    "head_dim": 256,
    "query_pre_attn_scalar": 256,
    "sliding_window": 4096,
}
FAMILIES: Final[dict[str, Family]] = {
    "LlamaForCausalLM": Family(_llama, defaults=_SILU),
    "MistralForCausalLM": Family(_mistral, defaults=_SILU | {"sliding_window": 4096}),
    "Qwen2ForCausalLM": Family(_qwen(qkv_bias=True), defaults=_SILU),
    "Qwen3ForCausalLM": Family(_qwen(qk_norm=True), defaults=_SILU | {"head_dim": 128}),
    "Gemma2ForCausalLM": Family(
        _gemma(every=2),
        _GEMMA_NAMES,
        defaults=_GEMMA | {"attn_logit_softcapping": 50.0, "final_logit_softcapping": 30.0},
        norm_offset=1.0,
    ),
    "Gemma3ForCausalLM": Family(
        _gemma(every=6, qk_norm=True),
        _GEMMA_NAMES,
        defaults=_GEMMA | {"rope_theta": 1e6, "rope_local_base_freq": 10000.0},
        norm_offset=1.0,
    ),
}
