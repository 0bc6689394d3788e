"""Variables of a module's parts other than its quantized kernels."""

import abc
import dataclasses
from collections.abc import Mapping
from typing import Any, override

import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array

from lowbit_jax.ptq.reconstruction.variables import Start
from lowbit_jax.ptq.stage import BlockWork, ModelWork
from lowbit_jax.spec import QuantSpec
from lowbit_jax.surgery import NORMS
from lowbit_jax.walk import layers

Work = BlockWork | ModelWork


@dataclasses.dataclass(frozen=True)
class ModuleVariable(abc.ABC):
    """Something about a module that is learned; finals are frozen.

    Attributes:
        lr: Its learning rate, before the optimizer's decay.
    """

    lr: float

    @abc.abstractmethod
    def init(self, module: nnx.Module, starts: Mapping[str, Start], work: Work) -> Any:
        """Its parameters.

        Args:
            module: The block, or the whole model.
            starts: Of the kernels, by path.
            work: What the stage works on.
        """

    @abc.abstractmethod
    def apply(self, parameters: Any, module: nnx.Module) -> None:
        """Gives the module what was learned."""

    def start(self, parameters: Any, path: str, start: Start, spec: QuantSpec) -> Start:
        """The start of a kernel whose inputs the module now divides."""
        return start


@dataclasses.dataclass(frozen=True)
class Norms(ModuleVariable):
    """Scales and biases of the norms, and the biases of layers."""

    lr: float = 1e-4

    @override
    def init(self, module: nnx.Module, starts: Mapping[str, Start], work: Work) -> dict[str, Array]:
        found = {}
        for path, part in layers(module):
            for name, variable in vars(part).items():
                if not isinstance(variable, nnx.Param) or name not in ("scale", "bias"):
                    continue
                if isinstance(part, NORMS) or name == "bias":
                    found[f"{path}/{name}"] = jnp.asarray(variable[...])
        return found

    @override
    def apply(self, parameters: dict[str, Array], module: nnx.Module) -> None:
        modules = dict(layers(module))
        for path, value in parameters.items():
            parent, _, name = path.rpartition("/")
            getattr(modules[parent], name)[...] = value
