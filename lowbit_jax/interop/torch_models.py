"""CIFAR ResNets in torch files, named as akamaster/pytorch_resnet_cifar10 names them."""

import re
from pathlib import Path
from typing import Final

import numpy as np
from flax import nnx
from jaxtyping import Float32

from lowbit_jax.interop.torch_pickle import read_tensors
from lowbit_jax.interop.weights import fill, layer_count
from lowbit_jax.models import ResNet, ResNetConfig

_ENDS: Final = {
    "kernel": "weight",
    "scale": "weight",
    "bias": "bias",
    "mean": "running_mean",
    "var": "running_var",
}
_COUNTERS: Final = r".*\.num_batches_tracked"


class _Source:
    """A state dict, without the prefix that training on several devices leaves."""

    def __init__(self, path: Path):
        tensors = read_tensors(path)
        self.where = str(path)
        self.tensors = {name.removeprefix("module."): t for name, t in tensors.items()}
        self.shapes = {name: tensor.shape for name, tensor in self.tensors.items()}

    def read(self, name: str) -> Float32[np.ndarray, "..."]:
        return self.tensors[name].astype(np.float32)


def load_resnet(path: str | Path) -> ResNet:
    """The model in a torch file, in evaluation mode; nothing in the file is executed.

    Raises:
        ValueError: The file is damaged, or its tensors are not those of a CIFAR ResNet.
        NotImplementedError: As of `torch_pickle.read_tensors`.
    """
    source = _Source(Path(path))
    widths: list[int] = []
    while (name := f"layer{len(widths) + 1}.0.conv1.weight") in source.shapes:
        widths.append(source.shapes[name][0] if source.shapes[name] else 0)
    stem, head = source.shapes.get("conv1.weight", ()), source.shapes.get("linear.weight", ())
    if not widths or len(stem) != 4 or len(head) != 2 or 0 in (*widths, *stem, *head):
        raise ValueError(
            f"{path}: not a CIFAR ResNet, which has conv1, layer1 ... layerN and linear. Its "
            f"tensors begin with {list(source.shapes)[:3]}."
        )
    stages = range(1, len(widths) + 1)
    blocks = [layer_count(source, rf"layer{stage}\.(\d+)\.") for stage in stages]
    config = ResNetConfig(
        blocks=tuple(blocks), widths=tuple(widths), in_channels=stem[1], out_features=head[0]
    )
    places = [f"layer{s}.{i}" for s, n in zip(stages, blocks, strict=True) for i in range(n)]

    def name_of(leaf: str) -> str:
        owner, _, end = leaf.rpartition("/")
        if match := re.fullmatch(r"layers/(\d+)/(conv|norm)(\d)", owner):
            number, kind, which = match.groups()
            theirs = f"{places[int(number)]}.{'bn' if kind == 'norm' else kind}{which}"
        else:
            theirs = {"conv": "conv1", "norm": "bn1", "head": "linear"}[owner]
        return f"{theirs}.{_ENDS[end]}"

    abstract = nnx.eval_shape(lambda: ResNet(config, rngs=nnx.Rngs(0)))
    model = fill(abstract, source, name_of, unused=_COUNTERS)
    model.eval()
    return model
