"""QDrop: activations that are quantized only here and there while kernels are learned."""

import dataclasses
from typing import Any, ClassVar, override

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from lowbit_jax.grid import Range
from lowbit_jax.nn import QuantStat, TrainTwin
from lowbit_jax.quantizers import Quantizer, State
from lowbit_jax.walk import layers, rebuilt


@dataclasses.dataclass(frozen=True)
class Dropping(Quantizer):
    """Another quantizer, some of whose elements stay float (arXiv:2203.05740, Eq. 6).

    Attributes:
        inner: The quantizer.
        share: Probability that an element stays float.
    """

    shared_part: ClassVar[bool] = True  # it exists only inside a reconstruction

    inner: Quantizer
    share: float

    @override
    def _check_symmetry(self) -> None:
        """What `inner` takes."""

    @override
    def range(self, x: Float[Array, "..."], state: State) -> Range:
        return self.inner.range(x, _without_draw(state))

    @override
    def fake_quant(self, x: Float[Array, "..."], state: State) -> Float[Array, "..."]:
        quantized = self.inner.fake_quant(x, _without_draw(state))
        key = jax.random.wrap_key_data(state["draw"])
        return jnp.where(jax.random.bernoulli(key, self.share, x.shape), x, quantized)


def _without_draw(state: State) -> State:
    return {name: value for name, value in state.items() if name != "draw"}


def with_dropping(block: nnx.Module, share: float) -> nnx.Module:
    """A clone of a block whose quantizers of inputs drop this share of their elements."""
    blank = jax.random.key_data(jax.random.key(0))

    def replace(path: str, layer: Any) -> Any:
        if isinstance(layer, TrainTwin) and layer.scheme.input is not None:
            inner = layer.scheme.input
            layer.scheme = dataclasses.replace(
                layer.scheme, input=Dropping(inner.spec, inner, share), product="float"
            )
            setattr(layer, "input_draw", QuantStat(blank))  # noqa: B010  a state of its quantizer
        return layer

    return rebuilt(block, replace)


def draw(block: nnx.Module, key: Array) -> None:
    """New draws for every quantizer of a block made by `with_dropping`."""
    for number, (_, layer) in enumerate(layers(block)):
        if hasattr(layer, "input_draw"):
            layer.input_draw[...] = jax.random.key_data(jax.random.fold_in(key, number))
