"""OmniQuant's learnable equivalent transformation."""

import dataclasses
from collections.abc import Mapping
from typing import Any, override

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array

from lowbit_jax import calibrate
from lowbit_jax.models.wiring import Link
from lowbit_jax.ptq.reconstruction.modules import ModuleVariable, Work
from lowbit_jax.ptq.reconstruction.variables import Start
from lowbit_jax.ptq.stage import BlockWork
from lowbit_jax.ptq.taps import Rows, fold
from lowbit_jax.spec import QuantSpec
from lowbit_jax.surgery import NORMS
from lowbit_jax.walk import layers


@dataclasses.dataclass(frozen=True)
class Equivalence(ModuleVariable):
    """A learned scale per feature between a norm and the layers behind it.

    OmniQuant's transformation (arXiv:2308.13137, Eq. 3): the norm's output is divided by s, folded
    into its scale, and the kernels' rows are multiplied by it before they are quantized, in a range
    that follows them. s starts as SmoothQuant's, max|x|^alpha / max|w|^(1 - alpha). The shift delta
    of the paper needs a norm with a bias and is left out; so are the pairs behind a linear layer.

    Attributes:
        lr: Of log s.
        alpha: Of the start.
    """

    lr: float = 5e-3
    alpha: float = 0.5

    @override
    def init(
        self, module: nnx.Module, starts: Mapping[str, Start], work: Work
    ) -> dict[str, dict[str, Any]]:
        if not isinstance(work, BlockWork):
            raise NotImplementedError(
                "Equivalence: needs the inputs of one block. Use it in a Reconstruction."
            )
        if work.wiring is None:
            raise ValueError(
                f"{work.name}: Equivalence has to know which norm feeds which layers. Pass "
                "ptq.run(..., wiring=Wiring(links=(Link(norm, layers), ...)))."
            )
        modules = dict(layers(module))
        links = [link for link in work.wiring.links if isinstance(modules[link.source], NORMS)]
        links = [link for link in links if all(target in starts for target in link.targets)]
        firsts = [link.targets[0] for link in links]
        zeros = {path: jnp.zeros(starts[path].weight.shape[-2]) for path in firsts}
        largest = fold(work.working, work.chain_hat, firsts, _largest, zeros)
        return {
            link.source: {"log": self._start(largest[link.targets[0]], link, starts)}
            | _affine(modules[link.source])
            | {"targets": {path: jnp.zeros(()) for path in link.targets}}
            for link in links
        }

    def _start(self, largest: Array, link: Link, starts: Mapping[str, Start]) -> Array:
        weights = [jnp.abs(starts[path].weight).max(axis=-1) for path in link.targets]
        weight = jnp.maximum(jnp.stack(weights).max(axis=0), 1e-5)
        return self.alpha * jnp.log(jnp.maximum(largest, 1e-5)) - (1 - self.alpha) * jnp.log(weight)

    @override
    def apply(self, parameters: dict[str, Any], module: nnx.Module) -> None:
        modules = dict(layers(module))
        for source, values in parameters.items():
            norm, factor = modules[source], jnp.exp(-values["log"])
            for name in ("scale", "bias"):
                if name in values:
                    value = jax.lax.stop_gradient(values[name]) * factor
                    getattr(norm, name)[...] = value

    @override
    def start(self, parameters: dict[str, Any], path: str, start: Start, spec: QuantSpec) -> Start:
        for values in parameters.values():
            if path in values["targets"]:
                weight = start.weight * jnp.exp(values["log"])[:, None]
                constant = jax.lax.stop_gradient(weight)
                found = calibrate.absmax if spec.symmetric else calibrate.minmax
                return Start(weight, found(constant, spec))
        return start


def _largest(rows: Rows, carry: Any) -> Any:
    return {path: jnp.maximum(m, jnp.abs(rows[path]).max(axis=0)) for path, m in carry.items()}


def _affine(norm: nnx.Module) -> dict[str, Array]:
    """The norm's scale and bias before the transformation."""
    found = {name: getattr(norm, name, None) for name in ("scale", "bias")}
    return {
        name: jnp.asarray(value[...])
        for name, value in found.items()
        if isinstance(value, nnx.Variable)
    }
