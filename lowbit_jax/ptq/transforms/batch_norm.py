"""Batch normalization folded into the layer in front of it."""

import dataclasses
from typing import Any, ClassVar, override

import jax.numpy as jnp
from flax import nnx

from lowbit_jax.models.identity import Identity
from lowbit_jax.models.wiring import with_structure
from lowbit_jax.ptq.layers import get_matrix, set_matrix, view_of
from lowbit_jax.ptq.stage import ModelWork, Stage
from lowbit_jax.ptq.transforms.folding import set_bias
from lowbit_jax.scheme import LayerScheme
from lowbit_jax.walk import layers, rebuilt


@dataclasses.dataclass(frozen=True)
class FoldBatchNorm(Stage):
    """With the running statistics of evaluation, a batch norm behind a layer W, b is

        gamma (x W + b - mean) / sqrt(var + eps) + beta = x (k W) + (b - mean) k + beta

    with k = gamma / sqrt(var + eps) per output channel (arXiv:1712.05877, Eq. 14). The layer takes
    k and the new bias over, and an `Identity` is left at the norm's path.

    Attributes:
        pairs: (layer, norm behind it) paths in the model; None: those of the model's wiring.
    """

    pairs: tuple[tuple[str, str], ...] | None = None

    transforms: ClassVar[bool] = True

    @override
    def prepare(self, work: ModelWork) -> nnx.Module:
        pairs = self.pairs
        if pairs is None:
            pairs = work.wiring.batch_norms if work.wiring is not None else ()
            if not pairs and _norms(work.model):
                raise ValueError(
                    "FoldBatchNorm: this model does not say which batch norm stands behind which "
                    f"layer. Pass pairs=((layer, norm), ...); its norms: {_norms(work.model)}."
                )
        model = with_structure(work.model, folded=True) if pairs else work.model
        modules = dict(layers(model))
        for layer, norm in pairs:
            for path in (layer, norm):
                if path not in modules:
                    raise ValueError(f"FoldBatchNorm: the model has no {path!r}.")
            _fold(modules[layer], modules[norm], layer, norm)
        folded = {norm for _, norm in pairs}
        return rebuilt(model, lambda path, m: Identity() if path in folded else m)


def _fold(layer: Any, norm: Any, layer_path: str, norm_path: str) -> None:
    if not isinstance(norm, nnx.BatchNorm):
        raise ValueError(f"FoldBatchNorm: {norm_path} is a {type(norm).__name__}, no BatchNorm.")
    if not isinstance(layer, nnx.Linear | nnx.Conv) or norm.axis != -1:
        raise NotImplementedError(
            f"FoldBatchNorm: {norm_path} (axis {norm.axis}) stands behind {layer_path}, a "
            f"{type(layer).__name__}; it is folded into Linear and Conv, along the last axis."
        )
    zero, one = jnp.zeros_like(norm.mean[...]), jnp.ones_like(norm.mean[...])
    gamma = one if norm.scale is None else norm.scale[...]
    beta = zero if norm.bias is None else norm.bias[...]
    bias = zero if layer.bias is None else layer.bias[...]
    k = gamma / jnp.sqrt(norm.var[...] + norm.epsilon)
    *stack, _, n = view_of(layer).matrix_shape
    set_matrix(layer, get_matrix(layer) * k.reshape(*stack, 1, n))
    set_bias(layer, (bias - norm.mean[...]) * k + beta)


def _norms(model: nnx.Module) -> list[str]:
    return [path for path, module in layers(model) if isinstance(module, nnx.BatchNorm)]


def check_no_batch_norm(blocks: dict[str, nnx.Module], schemes: dict[str, LayerScheme]) -> None:
    """Refuses a batch norm inside a block of which layers are quantized.

    Its running statistics are those of the float layer in front of it, and a solver that sees the
    layer alone would miss the factor behind it.

    Args:
        blocks: By path in the model.
        schemes: Of the layers to quantize, by path in the model.

    Raises:
        ValueError: There is one; the message says what folds it.
    """
    for name, block in blocks.items():
        if any(path.startswith(f"{name}/") for path in schemes) and (found := _norms(block)):
            raise ValueError(
                f"{name}/{found[0]}: an unfolded batch norm in a block that is quantized. Put "
                " FoldBatchNorm() first in the pipeline; for a model of your own "
                "FoldBatchNorm(pairs=((layer, norm), ...))."
            )
