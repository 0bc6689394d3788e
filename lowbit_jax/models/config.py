"""The decoder's configuration, and the checks that all model configurations share."""

import dataclasses
import math

import jax.numpy as jnp

DTYPES = ("float32", "bfloat16")
ONLINE = ("attention/out", "mlp/down")
ACTIVATIONS = ("silu", "gelu_tanh")


def require_sizes(where: str, **sizes: int | tuple[int, ...]) -> None:
    """Refuses a size, or a tuple of sizes, that is not made of integers of at least 1.

    Raises: ValueError: names `where`, the field and its value.
    """
    for name, size in sizes.items():
        if isinstance(size, list):
            raise ValueError(
                f"{where}: {name}={size!r} is a list; a configuration is hashable: "
                f"write {tuple(size)!r}."
            )
        for one in size if isinstance(size, tuple) else (size,):
            # bool is an int to Python: layers=True would pass for one layer.
            if not isinstance(one, int) or isinstance(one, bool) or one < 1:
                raise ValueError(f"{where}: {name}={size!r} must be made of integers >= 1.")


def _require_positive(where: str, name: str, value: float) -> None:
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value < math.inf:
        raise ValueError(f"{where}: {name}={value!r} must be a number > 0.")


@dataclasses.dataclass(frozen=True, kw_only=True)
class DecoderConfig:
    """A decoder-only transformer of the Llama family.

    Always: `heads` is a multiple of `kv_heads`, `head_size` is even, and the whole is hashable and
    JSON-able. The defaults are Llama 2; the fields from `activation` on are what its relatives
    (Llama 3, Mistral, Gemma 2 and 3) do otherwise.

    Attributes:
        vocab: Number of tokens; token ids are in `[0, vocab)`.
        dim: Width of the residual stream.
        layers: Number of blocks.
        heads: Query heads of one block.
        kv_heads: Key and value heads of one block (grouped-query attention, arXiv:2305.13245).
        ffn_dim: Width between `gate`/`up` and `down`.
        max_length: Longest context, in tokens.
        head_dim: Width of one head; None: `dim // heads`.
        tied: The head is the embedding's transpose.
        norm_eps: Added to the mean square inside RMSNorm.
        rope_theta: Base of the rotary frequencies (arXiv:2104.09864).
        qkv_bias: Query, key and value have a bias (Qwen2).
        qk_norm: RMSNorm over each query and key head, before the rotation (Qwen3).
        sub_norm: RMSNorm in front of `attention/out` and `mlp/down` (BitNet b1.58 2B4T,
            arXiv:2504.12285).
        stacked: Blocks are one scanned stack with a leading axis of length `layers` on every array.
        dtype: Compute type, "float32" or "bfloat16". Parameters, norms and logits are float32.
        activation: Of the MLP's gate: "silu", or "gelu_tanh", the approximation of GELU.
        embed_scale: Embeddings are multiplied by it where they enter the stream; the head is not.
        online: Layers of a block whose inputs are rotated when they are called (QuaRot,
            arXiv:2404.00456): "attention/out" (heads are mixed), "mlp/down" (features are).
        post_norm: RMSNorm also behind attention and MLP, before they are added (arXiv:2408.00118).
        query_scale: Factor of the scores; None: `head_size ** -0.5`.
        attention_softcap: Scores s become `cap * tanh(s / cap)` before the mask; None: they do not.
        logit_softcap: The same of the logits.
        windows: For each layer the number of positions that a token sees, its own included; 0: all
            before it. None: 0 everywhere.
        rope_factors: Divisor of each of the `head_size / 2` rotary frequencies; None: 1.
        local_rope_theta: Base of the frequencies in layers with a window, which are then not
            divided; None: as in the others.
    Raises:
        ValueError: a field has a value that no model can have; the message names both.
        NotImplementedError: `stacked`, and layers whose windows differ.
    """

    vocab: int
    dim: int
    layers: int
    heads: int
    kv_heads: int
    ffn_dim: int
    max_length: int
    head_dim: int | None = None
    tied: bool = False
    norm_eps: float = 1e-5
    rope_theta: float = 10000.0
    qkv_bias: bool = False
    qk_norm: bool = False
    sub_norm: bool = False
    stacked: bool = False
    dtype: str = "float32"
    activation: str = "silu"
    embed_scale: float = 1.0
    post_norm: bool = False
    online: tuple[str, ...] = ()
    query_scale: float | None = None
    attention_softcap: float | None = None
    logit_softcap: float | None = None
    windows: tuple[int, ...] | None = None
    rope_factors: tuple[float, ...] | None = None
    local_rope_theta: float | None = None

    def __post_init__(self):
        where = "DecoderConfig"
        names = ("vocab", "dim", "layers", "heads", "kv_heads", "ffn_dim", "max_length")
        require_sizes(where, **{name: getattr(self, name) for name in names})
        if self.heads % self.kv_heads:
            # Where a damaged file says billions of heads, not all of them are tried.
            fits = [n for n in range(1, min(self.heads, 1024) + 1) if self.heads % n == 0]
            raise ValueError(
                f"{where}: heads={self.heads} is not a multiple of kv_heads={self.kv_heads}, and "
                f"every key head serves the same number of query heads. kv_heads that fit: {fits}."
            )
        if self.head_dim is not None:
            require_sizes(where, head_dim=self.head_dim)
        elif self.dim % self.heads:
            raise ValueError(
                f"{where}: dim={self.dim} does not split into heads={self.heads} ({self.dim} = "
                f"{self.dim // self.heads} * {self.heads} + {self.dim % self.heads}). "
                f"Change one of them, or set head_dim."
            )
        if self.head_size % 2:
            raise ValueError(
                f"{where}: heads of width {self.head_size} cannot be rotated: RoPE turns pairs of "
                f"features. Set an even head_dim, or change dim={self.dim} or heads={self.heads}."
            )
        for name in ("norm_eps", "rope_theta", "embed_scale"):
            _require_positive(where, name, getattr(self, name))
        for name in ("query_scale", "attention_softcap", "logit_softcap", "local_rope_theta"):
            if getattr(self, name) is not None:
                _require_positive(where, name, getattr(self, name))
        for name in ("tied", "qkv_bias", "qk_norm", "sub_norm", "stacked", "post_norm"):
            if not isinstance(getattr(self, name), bool):
                raise ValueError(f"{where}: {name}={getattr(self, name)!r} must be True or False.")
        if unknown := sorted(set(self.online) - set(ONLINE)):
            raise ValueError(f"{where}: online={unknown} is not of {list(ONLINE)}.")
        if self.dtype not in DTYPES:
            raise ValueError(
                f"{where}: compute dtype {self.dtype!r} is not known. Known: {list(DTYPES)}."
            )
        if self.activation not in ACTIVATIONS:
            raise ValueError(
                f"{where}: activation {self.activation!r} is not known. Known: {list(ACTIVATIONS)}."
            )
        self._check_positions(where)

    def _check_positions(self, where: str) -> None:
        """Refuses windows and rotary factors that do not fit the layers and the heads."""
        for name, length in (("windows", self.layers), ("rope_factors", self.head_size // 2)):
            value = getattr(self, name)
            if value is not None and (not isinstance(value, tuple) or len(value) != length):
                raise ValueError(f"{where}: {name}={value!r} must be a tuple of {length} numbers.")
        for factor in self.rope_factors or ():
            _require_positive(where, "rope_factors", factor)
        windows = self.windows or ()
        if any(not isinstance(w, int) or isinstance(w, bool) or w < 0 for w in windows):
            raise ValueError(f"{where}: windows={windows!r} must be made of integers >= 0.")
        if self.stacked and len(set(windows)) > 1:
            raise NotImplementedError(
                f"{where}: stacked layers are one program, and windows={windows!r} differ. "
                f"Set stacked=False."
            )

    def window(self, layer: int) -> int:
        """Positions that a token sees in the layer of that number; 0: all before it."""
        return 0 if self.windows is None else self.windows[layer]

    @property
    def head_size(self) -> int:
        """Width of one head: `head_dim`, or `dim // heads` where that is None."""
        return self.dim // self.heads if self.head_dim is None else self.head_dim

    @property
    def compute_dtype(self) -> jnp.dtype:
        """`dtype` as a type that arrays understand."""
        return jnp.dtype(self.dtype)
