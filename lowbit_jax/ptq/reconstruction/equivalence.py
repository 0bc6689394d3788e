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
from lowbit_jax.ptq.layers import get_matrix, set_matrix
from lowbit_jax.ptq.reconstruction.modules import ModuleVariable, Work
from lowbit_jax.ptq.reconstruction.variables import Start
from lowbit_jax.ptq.stage import BlockWork
from lowbit_jax.ptq.taps import Rows, fold
from lowbit_jax.ptq.transforms.folding import (
    Which,
    check_which,
    links_of,
    row_magnitudes,
    to_source,
    to_target,
)
from lowbit_jax.spec import QuantSpec
from lowbit_jax.surgery import NORMS
from lowbit_jax.walk import layers


@jax.tree_util.register_static
@dataclasses.dataclass(frozen=True)
class _Static:
    """A link among parameters, which is not one."""

    link: Link


@dataclasses.dataclass(frozen=True)
class Equivalence(ModuleVariable):
    """A learned scale per feature between a norm, or a linear layer, and the layers behind it.

    OmniQuant's transformation (arXiv:2308.13137, Eq. 3): what the source makes is divided by s,
    folded into the norm's scale or the layer's columns, and the rows of the kernels behind it are
    multiplied by s, all before they are quantized, in ranges that follow them. s starts as
    SmoothQuant's, max|x|^alpha / max|w|^(1 - alpha). The shift delta of the paper needs a norm with
    a bias and is left out, and so is the scale between queries and keys.

    Attributes:
        lr: Of log s.
        alpha: Of the start.
        links: "norms": behind norms only; "all": behind linear layers, too (values to output
            projection, up to down).
    """

    lr: float = 5e-3
    alpha: float = 0.5
    links: Which = "norms"

    def __post_init__(self):
        check_which("Equivalence", self.links)

    @override
    def init(
        self, module: nnx.Module, starts: Mapping[str, Start], work: Work
    ) -> dict[str, dict[str, Any]]:
        if not isinstance(work, BlockWork):
            raise NotImplementedError(
                "Equivalence: needs the inputs of one block. Use it in a Reconstruction."
            )
        modules = dict(layers(module))
        links = [
            link
            for link in links_of(work, "Equivalence", self.links)
            if all(target in starts for target in link.targets)
        ]
        for link in links:
            if link.source in starts and starts[link.source].weight.ndim > 2:
                raise NotImplementedError(
                    f"{work.name}/{link.source}: Equivalence: its kernel is a stack of matrices; a "
                    'scale is folded into the columns of one. Use links="norms".'
                )
        firsts = [link.targets[0] for link in links]
        zeros = {path: jnp.zeros_like(row_magnitudes(work.layer(path))) for path in firsts}
        largest = fold(work.working, work.chain_hat, firsts, _largest, zeros)
        return {
            link.source: {
                "log": self._start(largest[link.targets[0]], link, work),
                "before": _before(modules[link.source], fixed=link.source not in starts),
                "link": _Static(link),
            }
            for link in links
        }

    def _start(self, largest: Array, link: Link, work: BlockWork) -> Array:
        rows = [row_magnitudes(work.layer(path)) for path in link.targets]
        weight = to_source(jnp.stack(rows).max(axis=0), link, "max")
        inputs = to_source(largest, link, "max")
        weight, inputs = (jnp.log(jnp.maximum(m, 1e-5)) for m in (weight, inputs))
        return self.alpha * inputs - (1 - self.alpha) * weight

    @override
    def apply(self, parameters: dict[str, Any], module: nnx.Module) -> None:
        modules = dict(layers(module))
        for path, values in parameters.items():
            source, factor = modules[path], jnp.exp(-values["log"])
            for name, value in jax.lax.stop_gradient(values["before"]).items():
                if name == "kernel":
                    set_matrix(source, value * factor[None, :])
                else:
                    variable = getattr(source, name)
                    shape = variable[...].shape
                    variable[...] = (value.reshape(-1) * factor).reshape(shape)

    @override
    def start(self, parameters: dict[str, Any], path: str, start: Start, spec: QuantSpec) -> Start:
        weight = start.weight
        for source, values in parameters.items():
            link = values["link"].link
            if path == source:
                weight = weight * jnp.exp(-values["log"])[None, :]
            if path in link.targets:
                rows = to_target(jnp.exp(values["log"]), link)
                rows = jnp.tile(rows, weight.shape[-2] // rows.shape[0])  # a convolution's window
                weight = weight * rows.reshape(*(1 for _ in weight.shape[:-2]), -1, 1)
        if weight is start.weight:
            return start
        found = calibrate.absmax if spec.symmetric else calibrate.minmax
        return Start(weight, found(jax.lax.stop_gradient(weight), spec))


def _largest(rows: Rows, carry: Any) -> Any:
    return {
        path: jnp.maximum(m, jnp.abs(rows[path]).reshape(-1, m.shape[0]).max(axis=0))
        for path, m in carry.items()
    }


def _before(source: nnx.Module, *, fixed: bool) -> dict[str, Array]:
    """What of a source the scale is folded into, before it is.

    Args:
        source: A norm or a linear layer.
        fixed: Whether its kernel, if it has one, is not made of variables itself.
    """
    found = {name: getattr(source, name, None) for name in ("scale", "bias")}
    before = {
        name: jnp.asarray(value[...])
        for name, value in found.items()
        if isinstance(value, nnx.Variable)
    }
    if fixed and not isinstance(source, NORMS):
        before["kernel"] = get_matrix(source)
    return before
