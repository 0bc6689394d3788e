"""QLoRA: a frozen low-bit model with trained adapters of low rank (arXiv:2305.14314).

    model = lb.pack_model(lb.quantize_model(model, "nf4_g64_dq"))
    model = add_lora(model, rank=64, alpha=16, rngs=nnx.Rngs(0))
    graphdef, adapters, rest = nnx.split(model, nnx.LoRAParam, ...)   # train `adapters` only
    model = merge_lora(model)                                         # float kernels again

Every adapted layer computes, Eq. 5 of the paper with LoRA's factor (arXiv:2106.09685, section 4.1),

    y = x dequantize(W) + (alpha / rank) x A B,        A [K, rank], B [rank, N],

where W stays packed: gradients go through it to x, and nothing of it is trained. B starts at zero,
so that an adapted model begins as the packed one. The paper's double quantization stores the block
scales in 8 bits, their mean subtracted: `nf4_g64_dq` has one float32 factor for the outputs of a
block of 64 inputs, where the paper has one for 256 scales in a row.

Left out: dropout in front of A, paged optimizers (a property of one vendor's driver).
"""

import re
from typing import Any, Final

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array

from lowbit_jax.nn import PackedLinear, PackedLinearGeneral, PackedTwin, to_float
from lowbit_jax.walk import layers, rebuilt

ADAPTABLE: Final = (PackedLinear, PackedLinearGeneral)


class LoRALinear(nnx.Module):
    """A packed layer plus its adapter.

    It stands at the layer's own path, and the layer at `PATH/linear`.

    Attributes:
        linear: The packed layer, frozen.
        lora_a: float32 [K, rank], uniform in `sqrt(6 / K) * [-1, 1)` at the beginning.
        lora_b: float32 [rank, N], zero at the beginning.
        factor: alpha / rank.
    """

    linear: PackedLinear | PackedLinearGeneral

    def __init__(
        self,
        linear: PackedLinear | PackedLinearGeneral,
        rank: int,
        alpha: float,
        *,
        rngs: nnx.Rngs,
    ):
        """Adapts a packed layer; its variables are shared, not copied."""
        k, n = linear.matrix.shape
        self.linear = linear
        self.factor = alpha / rank
        init = jax.nn.initializers.he_uniform()
        self.lora_a = nnx.LoRAParam(init(rngs.params(), (k, rank), jnp.float32))
        self.lora_b = nnx.LoRAParam(jnp.zeros((rank, n), jnp.float32))

    def __call__(self, x: Array, *args: Any, **kwargs: Any) -> Array:
        """Like the layer's own call, plus the adapter's product, in the dtype of the result."""
        linear: Any = self.linear
        y = linear(x, *args, **kwargs)
        rows = linear.rows(x).astype(y.dtype)
        down = rows @ self.lora_a[...].astype(y.dtype)
        up = down @ self.lora_b[...].astype(y.dtype)
        features = np.atleast_1d(linear.out_features)
        return y + (up * self.factor).reshape(*up.shape[:-1], *features)

    def merged(self) -> nnx.Module:
        """The plain Flax layer whose kernel is `dequantize(W) + factor * A B`."""
        layer: Any = to_float(self.linear)
        delta = jnp.dot(self.lora_a[...], self.lora_b[...], precision="highest") * self.factor
        kernel = layer.kernel[...]
        layer.kernel[...] = (
            kernel.astype(jnp.float32) + self.linear.view.from_matrix(delta)
        ).astype(kernel.dtype)
        return layer


def add_lora(
    model: nnx.Module,
    *,
    rank: int,
    alpha: float,
    rngs: nnx.Rngs,
    pattern: str | None = None,
) -> nnx.Module:
    """A new model whose packed linear layers carry adapters.

    The state of `nnx.LoRAParam` is what is trained and what is worth saving; the packed model can
    be saved without it.

    Args:
        model: Packed; it is left untouched, and its arrays are shared.
        rank: Of the adapters.
        alpha: Their product is multiplied by alpha / rank.
        rngs: Its stream "params" draws A.
        pattern: Regular expression of whole layer paths; None: every packed `Linear` and
            `LinearGeneral`, which is what the paper found to be needed.

    Raises:
        ValueError: A rank below 1, a layer that has an adapter, a pattern that matches no packed
            layer.
        NotImplementedError: The pattern matches a packed layer of another kind, or a stack.
    """
    if rank < 1:
        raise ValueError(f"add_lora: rank={rank} must be at least 1.")
    if adapted := [path for path, module in layers(model) if isinstance(module, LoRALinear)]:
        raise ValueError(
            f"add_lora: {adapted[0]} has an adapter already. Call merge_lora(model) first, or "
            "start from the packed model."
        )
    packed = {path: m for path, m in layers(model) if isinstance(m, PackedTwin)}
    if pattern is None:
        chosen = {path: m for path, m in packed.items() if isinstance(m, ADAPTABLE)}
    else:
        chosen = {path: m for path, m in packed.items() if re.fullmatch(pattern, path)}
    if not chosen:
        raise ValueError(
            f"add_lora: {'no' if pattern is None else f'{pattern!r} matches no'} packed linear "
            f"layer; packed are {sorted(packed)[:5] or 'none: call lb.pack_model first'}."
        )
    for path, module in chosen.items():
        if not isinstance(module, ADAPTABLE) or len(module.matrix.shape) != 2:
            raise NotImplementedError(
                f"add_lora: {path}: a {type(module).__name__} of shape {module.matrix.shape} takes "
                "no adapter; Linear and LinearGeneral with a matrix [K, N] do. Leave it out of the "
                "pattern."
            )

    def replace(path: str, module: Any) -> Any:
        return LoRALinear(module, rank, alpha, rngs=rngs) if path in chosen else module

    return rebuilt(model, replace)


def merge_lora(model: nnx.Module) -> nnx.Module:
    """A new model whose adapted layers are plain float layers with the adapters added.

    Quantizers of their activations are dropped; packed layers without an adapter stay packed.

    Raises:
        ValueError: No layer has an adapter.
    """
    if not any(isinstance(module, LoRALinear) for _, module in layers(model)):
        raise ValueError("merge_lora: no layer of this model has an adapter. Call add_lora first.")

    def replace(path: str, module: Any) -> Any:
        return module.merged() if isinstance(module, LoRALinear) else module

    return rebuilt(model, replace)
