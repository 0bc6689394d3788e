"""Models in GGUF files: from their metadata and tensors to a `Decoder`.

What differs from the tensors of a Hugging Face checkpoint: the rows of `attn_q` and `attn_k` of
the architecture "llama" are in the order of the paper's rotation (pairs `2 i`, `2 i + 1` of a head)
where our `rotate` pairs `i` and `i + half`, so they are put back; Gemma's norms have their 1 added
already; and some constants of Gemma stand in llama.cpp instead of in the file.
"""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any, Final

import numpy as np
from jaxtyping import Float32

from lowbit_jax.interop.codecs.ggml_blocks import BLOCK_TYPES, decode
from lowbit_jax.interop.codecs.parts import Kernel
from lowbit_jax.interop.fields import Fields
from lowbit_jax.interop.gguf import GGUFFile
from lowbit_jax.interop.methods import Weights
from lowbit_jax.interop.packed import fill_packed
from lowbit_jax.interop.rotary import linear_factors
from lowbit_jax.interop.weights import fill_decoder, layer_name, require_layers, require_sizes
from lowbit_jax.models import Decoder, DecoderConfig
from lowbit_jax.quantizers import Quantizer

_LAYER: Final = r"blk\.(\d+)\."
ROPE_FACTORS: Final = "rope_freqs.weight"
NAMES: Final = {
    "embed/embedding": "token_embd.weight",
    "norm/scale": "output_norm.weight",
    "head/kernel": "output.weight",
    "layers/{}/attention_norm/scale": "blk.{}.attn_norm.weight",
    **{
        f"layers/{{}}/attention/{ours}/{leaf}": f"blk.{{}}.{theirs}.{end}"
        for ours, theirs in (("query", "attn_q"), ("key", "attn_k"), ("value", "attn_v"))
        for leaf, end in (("kernel", "weight"), ("bias", "bias"))
    },
    "layers/{}/attention/query_norm/scale": "blk.{}.attn_q_norm.weight",
    "layers/{}/attention/key_norm/scale": "blk.{}.attn_k_norm.weight",
    "layers/{}/attention/out/kernel": "blk.{}.attn_output.weight",
    "layers/{}/attention_post_norm/scale": "blk.{}.post_attention_norm.weight",
    "layers/{}/mlp_norm/scale": "blk.{}.ffn_norm.weight",
    "layers/{}/mlp/gate/kernel": "blk.{}.ffn_gate.weight",
    "layers/{}/mlp/up/kernel": "blk.{}.ffn_up.weight",
    "layers/{}/mlp/down/kernel": "blk.{}.ffn_down.weight",
    "layers/{}/mlp_post_norm/scale": "blk.{}.post_ffw_norm.weight",
}


@dataclasses.dataclass(frozen=True)
class _Family:
    """How an architecture differs.

    interleaved: Rows of query and key are in the paper's order.
    options: What it changes in the configuration that the metadata give for all.
    """

    interleaved: bool = False
    options: Callable[[Fields, DecoderConfig], dict[str, Any]] = lambda fields, config: {}


def _gemma(largest: int, every: int, **more: Any) -> _Family:
    """Gemma 2 and 3.

    largest: Layers of the size whose scores are scaled otherwise.
    every: Each so-many-th layer sees everything; the others have a window.
    """

    def options(fields: Fields, config: DecoderConfig) -> dict[str, Any]:
        width = config.dim / config.heads if config.layers == largest else config.head_size
        window = fields.integer("attention.sliding_window", 4096)
        return {
            "activation": "gelu_tanh",
            "embed_scale": config.dim**0.5,
            "post_norm": True,
            "query_scale": width**-0.5,
            "attention_softcap": fields.number("attn_logit_softcapping", None),
            "logit_softcap": fields.number("final_logit_softcapping", None),
            "windows": tuple(window if (i + 1) % every else 0 for i in range(config.layers)),
            **more,
        }

    return _Family(options=options)


def _windows(fields: Fields, config: DecoderConfig) -> dict[str, Any]:
    window = fields.integer("attention.sliding_window", None)
    return {} if window is None else {"windows": (window,) * config.layers}


FAMILIES: Final[dict[str, _Family]] = {
    "llama": _Family(interleaved=True, options=_windows),
    "qwen2": _Family(),
    "qwen3": _Family(),
    "gemma2": _gemma(largest=46, every=2),
    "gemma3": _gemma(largest=62, every=6, local_rope_theta=10000.0),
}


class _Source:
    """A file's tensors but for the table of rotary factors, which is configuration."""

    def __init__(self, file: GGUFFile):
        self.where, self.read, self.file = str(file.path), file.read, file
        tensors = {n: t for n, t in file.tensors.items() if n != ROPE_FACTORS}
        self.shapes = {n: t.shape for n, t in tensors.items()}
        self.quantized = frozenset(
            n for n, t in tensors.items() if t.type.name in BLOCK_TYPES and len(t.shape) == 2
        )

    def kernel(self, name: str) -> Kernel:
        """See `interop.packed.PackedSource`."""
        tensor = self.file.tensors[name]
        rows, inputs = tensor.shape
        where = f"{self.where}: {name}"
        return decode(self.file.raw(name), (rows, inputs), tensor.type.name, where=where)

    def input(self, name: str) -> Quantizer | None:
        """None: what GGUF says of weights says nothing of activations."""
        return None

    def input_state(self, name: str) -> Mapping[str, np.ndarray]:
        """None."""
        return {}


def architecture_of(file: GGUFFile) -> str:
    """The architecture that a file says it is of.

    Raises:
        ValueError: It says none.
        NotImplementedError: It is none that is known here.
    """
    name = Fields(file.metadata, str(file.path)).text("general.architecture")
    if name not in FAMILIES:
        raise NotImplementedError(
            f"{file.path}: the architecture {name!r} is not supported. Supported: "
            f"{sorted(FAMILIES)}."
        )
    return name


def load_decoder(file: GGUFFile, weights: Weights = "float") -> Decoder:
    """The model in a file; what is not packed is float32.

    Raises:
        ValueError: Metadata and tensors do not belong together.
        NotImplementedError: An architecture, an option or a type of tensor that is not known here.
    """
    family, source = FAMILIES[architecture_of(file)], _Source(file)
    config = _config(file, family, source)

    def prepare(path: str, tensor: np.ndarray) -> np.ndarray:
        if family.interleaved and "/attention/query/" in path:
            return half_split(tensor, config.heads)
        if family.interleaved and "/attention/key/" in path:
            return half_split(tensor, config.kv_heads)
        return tensor

    if weights == "float" or not source.quantized:
        return fill_decoder(config, source, NAMES, prepare=prepare)

    def columns(path: str) -> np.ndarray | None:
        n = source.shapes[layer_name(NAMES, path)][0]
        order = np.arange(n, dtype=np.float32).reshape(-1, 1)
        moved = prepare(path, order)
        return None if moved is order else moved.reshape(-1).astype(np.int32)

    return fill_packed(config, source, NAMES, prepare=prepare, columns=columns)


def half_split(
    tensor: Float32[np.ndarray, "rows *inputs"], heads: int
) -> Float32[np.ndarray, "rows *inputs"]:
    """The rows of each head, from pairs side by side to pairs half a head apart."""
    rows = tensor.reshape(heads, -1, 2, *tensor.shape[1:])
    return rows.swapaxes(1, 2).reshape(tensor.shape)


def _config(file: GGUFFile, family: _Family, source: _Source) -> DecoderConfig:
    fields = Fields(file.metadata, source.where, f"{architecture_of(file)}.")
    if fields.has("expert_count") and fields.values[f"{fields.prefix}expert_count"] != 0:
        fields.unsupported("expert_count", "mixtures of experts have no loader")
    for name in ("attention.head_count", "attention.head_count_kv", "feed_forward_length"):
        if isinstance(fields.values.get(fields.prefix + name), np.ndarray):
            fields.unsupported(name, "layers of different sizes have no loader")
    embedding = source.shapes.get(NAMES["embed/embedding"], ())
    if len(embedding) != 2:
        raise ValueError(f"{source.where}: there is no matrix {NAMES['embed/embedding']}.")
    layers = fields.integer("block_count")
    require_layers(source, _LAYER, layers)
    heads = fields.integer("attention.head_count")
    config = DecoderConfig(
        vocab=embedding[0],
        dim=fields.integer("embedding_length"),
        layers=layers,
        heads=heads,
        kv_heads=fields.integer("attention.head_count_kv", heads),
        ffn_dim=fields.integer("feed_forward_length"),
        max_length=fields.integer("context_length"),
        head_dim=fields.integer("attention.key_length", None),
        tied=NAMES["head/kernel"] not in source.shapes,
        norm_eps=fields.number("attention.layer_norm_rms_epsilon"),
        rope_theta=fields.number("rope.freq_base", 10000.0),
        qkv_bias="blk.0.attn_q.bias" in source.shapes,
        qk_norm="blk.0.attn_q_norm.weight" in source.shapes,
        query_scale=fields.number("attention.scale", None),
    )
    require_sizes(config, source, NAMES)
    for name in ("attention.value_length", "rope.dimension_count"):
        if fields.integer(name, config.head_size) != config.head_size:
            fields.unsupported(name, f"heads are {config.head_size} wide, and all of one is used")
    factors = _rope_factors(file, fields, config.head_size)
    return dataclasses.replace(config, rope_factors=factors, **family.options(fields, config))


def _rope_factors(file: GGUFFile, fields: Fields, head_size: int) -> tuple[float, ...] | None:
    if ROPE_FACTORS in file.tensors:
        if file.tensors[ROPE_FACTORS].shape != (head_size // 2,):
            raise ValueError(
                f"{file.path}: {ROPE_FACTORS} has the shape {file.tensors[ROPE_FACTORS].shape}, "
                f"and heads of width {head_size} have {head_size // 2} frequencies."
            )
        return tuple(file.read(ROPE_FACTORS).tolist())
    kind = fields.text("rope.scaling.type", "none")
    if kind == "none":
        return None
    if kind != "linear":
        fields.unsupported("rope.scaling.type", "known are 'none' and 'linear'")
    return linear_factors(fields.number("rope.scaling.factor"), head_size)
