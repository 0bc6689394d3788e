"""A decoder's leaves by path, one layer at a time, as exports write them."""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from lowbit_jax.formats import Learned
from lowbit_jax.interop.codecs.parts import Kernel
from lowbit_jax.models import Decoder
from lowbit_jax.nn import Packed, PackedTwin, QuantStat, TrainTwin
from lowbit_jax.ops.fp4_training import block_hadamard
from lowbit_jax.qtensor import QTensor
from lowbit_jax.scheme import LayerScheme
from lowbit_jax.spec import QuantSpec
from lowbit_jax.surgery import pack_model, quantized_layers


@dataclasses.dataclass(frozen=True)
class Leaf:
    """One kernel, bias, norm scale or embedding.

    path: `layers/0/mlp/up/kernel`, also of a stacked model.
    shape: In the model's own layout: kernels [in, out], embeddings [vocab, dim].
    scheme: Of the layer, if it is quantized.
    spec: What a kernel with codes is quantized as; None: it is float.
    value: The float array, dequantized if it has codes; float32 on the host, of `shape`.
    kernel: The codes, [in, out]; an embedding's are [dim, vocab].
    input_state: State of the quantizer of its layer's inputs.
    """

    path: str
    shape: tuple[int, ...]
    scheme: LayerScheme | None
    spec: QuantSpec | None
    value: Callable[[], np.ndarray]
    kernel: Callable[[], Kernel]
    input_state: Mapping[str, Any]


def leaves_of(model: Decoder) -> list[Leaf]:
    """The leaves of a decoder that is float or packed; one that trains is packed first.

    Raises: ValueError: Its kernels were brought into the order of a backend.
    """
    config, twins = model.config, dict(quantized_layers(model))
    packed: nnx.Module = model
    if any(isinstance(twin, TrainTwin) for twin in twins.values()):
        packed = pack_model(model)
        twins = dict(quantized_layers(packed))
    found = []
    for key, variable in nnx.to_flat_state(nnx.state(packed)):
        path = "/".join(map(str, key))
        name = str(key[-1])
        value = variable.get_value()
        if isinstance(variable, QuantStat):
            continue
        twin = twins.get("/".join(map(str, key[:-1]))) if name != "bias" else None
        if isinstance(variable, Packed):
            if twin is None or name != twin.kernel_name:
                continue  # belongs to the kernel beside it
            value = twin.freeze_kernel()
        if config.stacked and path.startswith("layers/"):
            rest = path.removeprefix("layers/")
            found += [
                _leaf(f"layers/{i}/{rest}", value, twin, layer=i) for i in range(config.layers)
            ]
        else:
            found.append(_leaf(path, value, twin))
    return found


def _leaf(path: str, value: Any, twin: Any, layer: int | None = None) -> Leaf:
    def own(tree: Any) -> Any:
        return tree if layer is None else jax.tree.map(lambda array: array[layer], tree)

    def of_twin(name: str) -> Any:
        variable = getattr(twin, name, None)
        return None if variable is None else np.asarray(own(variable.get_value()))

    def kernel() -> Kernel:
        _check_codes(path, value, scheme)
        return stored()

    def stored() -> Kernel:
        permutation, divisor = of_twin("input_permutation"), of_twin("kernel_global_divisor")
        return Kernel(own(value), permutation, divisor)

    def array() -> np.ndarray:
        if isinstance(value, QTensor):
            values = stored().dequantize()
            if scheme is not None and scheme.hadamard:
                rotated = block_hadamard(jnp.asarray(values.T), scheme.hadamard)
                values = np.asarray(rotated).T
            return values.T if path.endswith("embedding") else values
        return np.asarray(jax.device_get(own(value))).astype(np.float32)

    shape = tuple(value.shape) if layer is None else tuple(value.shape[1:])
    state = {} if twin is None else {n: own(v) for n, v in twin.state("input").items()}
    scheme = twin.scheme if isinstance(twin, PackedTwin | TrainTwin) else None
    spec = value.spec if isinstance(value, QTensor) else None
    if spec is not None and path.endswith("embedding"):
        shape = shape[::-1]
    return Leaf(path, shape, scheme, spec, array, kernel, state)


def _check_codes(path: str, value: Any, scheme: LayerScheme | None) -> None:
    """Raises NotImplementedError for codes that stand for nothing outside this library."""
    if isinstance(value, QTensor) and isinstance(value.spec.format, Learned):
        raise NotImplementedError(
            f"{path}: the values of {value.spec.format.name} are learned, and no file format of "
            "others holds them beside codes. The nearest that fits: the float values (dense), or a "
            "quantizer of constant ones, such as w1_58a16 or w2a16_lsq."
        )
    if scheme is not None and scheme.hadamard:
        raise NotImplementedError(
            f"{path}: codes behind a Hadamard rotation of {scheme.hadamard} inputs, which no file "
            "format of others says. The nearest that fits: the float values (dense), or mxfp4."
        )
