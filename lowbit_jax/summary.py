"""`summary(model)`: every layer, how it is quantized, and what it takes."""

import dataclasses
from typing import Any

import jax
import numpy as np
from flax import nnx

from lowbit_jax.nn import PackedTwin, Twin
from lowbit_jax.ops import Prepared
from lowbit_jax.qtensor import QTensor
from lowbit_jax.walk import layers


@dataclasses.dataclass(frozen=True)
class Row:
    """One layer.

    Attributes:
        path: Such as `layers/0/mlp/up`.
        layer: Class of the module.
        scheme: How it is quantized; "float" if it is not.
        bits: Bits a weight takes once packed, with its scales and padding; those of its dtype if
            float.
        shape: Shape of its kernel, as the layer has it.
        float_bytes: Bytes of its parameters in float32, before.
        bytes: Bytes once packed, after: kernel, scales, zero points, and what stays float beside
            them, in its own dtype.
        weights: Weights that are quantized; 0 if it is float.
        kernel_bytes: Bytes of the packed kernel with scales and padding; 0 if it is float.
    """

    path: str
    layer: str
    scheme: str
    bits: float
    shape: tuple[int, ...]
    float_bytes: int
    bytes: int
    weights: int = 0
    kernel_bytes: int = 0


@dataclasses.dataclass(frozen=True)
class Summary:
    """The rows of a model; printing it gives a table."""

    rows: tuple[Row, ...]

    @property
    def parameters(self) -> int:
        """Parameters of the float model."""
        return self.float_bytes // 4

    @property
    def float_bytes(self) -> int:
        """Bytes of all parameters in float32."""
        return sum(row.float_bytes for row in self.rows)

    @property
    def bytes(self) -> int:
        """Bytes of the packed model."""
        return sum(row.bytes for row in self.rows)

    @property
    def bits_per_weight(self) -> float:
        """Bits a quantized weight takes, with scales and padding; 32 if nothing is quantized."""
        weights = sum(row.weights for row in self.rows)
        return sum(row.kernel_bytes for row in self.rows) * 8 / weights if weights else 32.0

    def __str__(self) -> str:
        header = ("path", "layer", "scheme", "bits", "shape", "bytes before", "after")
        body = [
            (
                row.path or ".",
                row.layer,
                row.scheme,
                f"{row.bits:.3g}",
                "x".join(map(str, row.shape)),
                f"{row.float_bytes:,}",
                f"{row.bytes:,}",
            )
            for row in self.rows
        ]
        total = ("total", "", "", "", "", f"{self.float_bytes:,}", f"{self.bytes:,}")
        widths = [max(map(len, column)) for column in zip(header, *body, total, strict=True)]
        right = (False, False, False, True, False, True, True)

        def line(cells: tuple[str, ...]) -> str:
            padded = (
                c.rjust(w) if r else c.ljust(w)
                for c, w, r in zip(cells, widths, right, strict=True)
            )
            return "  ".join(padded).rstrip()

        rule = "  ".join("-" * w for w in widths)
        quantized = sum(row.weights for row in self.rows)
        last = (
            f"{self.parameters:,} parameters; {quantized:,} weights quantized to "
            f"{self.bits_per_weight:.4g} bits, {self.float_bytes / max(self.bytes, 1):.3g} times "
            "smaller than float32."
        )
        stayed = [row.path or "." for row in self.rows if row.weights == 0]
        floats = f"Float: {', '.join(stayed)}." if stayed else "Nothing stayed float."
        return "\n".join([line(header), rule, *map(line, body), rule, line(total), last, floats])

    __repr__ = __str__


def summary(model: nnx.Module) -> Summary:
    """Every module that owns parameters, with path, scheme, bits, shape, and bytes before and
    after.

    Works on float, quantized and packed models, and on abstract ones (`nnx.eval_shape`).
    """
    rows = []
    for path, module in layers(model):
        row = _twin_row(path, module) if isinstance(module, Twin) else _float_row(path, module)
        if row is not None:
            rows.append(row)
    return Summary(tuple(rows))


def _twin_row(path: str, twin: Twin) -> Row:
    own = {name: v.get_value() for name, v in vars(twin).items() if isinstance(v, nnx.Variable)}
    kernel = own.pop(twin.kernel_name)
    kept = [value for name, value in own.items() if not name.startswith("kernel_")]
    added = ("kernel_", "input_", "output_")
    beside = sum(_size(value) for name, value in own.items() if not name.startswith(added))
    lead = kernel.shape
    if twin.scheme.weight is None:
        size, weights, bits = _size(kernel), 0, 8.0 * kernel.dtype.itemsize
        kernel_bytes = _bytes(kernel)
    else:
        q = _frozen(twin)
        size = weights = q.size
        kernel_bytes, bits = q.nbytes, q.bits_per_weight
        stack = q.shape[: q.ndim - len(twin.view.matrix_shape)]
        lead = (*stack, *twin.view.kernel_shape)
    return Row(
        path=path,
        layer=type(twin).__name__,
        scheme=twin.scheme.describe(),
        bits=bits,
        shape=tuple(lead),
        float_bytes=4 * (size + beside),
        bytes=kernel_bytes + sum(map(_bytes, kept)),
        weights=weights,
        kernel_bytes=kernel_bytes if weights else 0,
    )


def _frozen(twin: Twin) -> QTensor | Prepared:
    """The packed kernel's shapes, whether the twin's own arrays are there or abstract."""
    if isinstance(twin, PackedTwin):
        return twin.matrix
    graphdef, state = nnx.split(twin)
    return jax.eval_shape(lambda state: nnx.merge(graphdef, state).freeze_kernel(), state)


def _float_row(path: str, module: Any) -> Row | None:
    leaves = [
        leaf
        for value in vars(module).values()
        if isinstance(value, nnx.Param)
        for leaf in jax.tree.leaves(value.get_value())
    ]
    if not leaves:
        return None
    largest = max(leaves, key=_size)
    return Row(
        path=path,
        layer=type(module).__name__,
        scheme="float",
        bits=8.0 * largest.dtype.itemsize,
        shape=tuple(largest.shape),
        float_bytes=4 * sum(map(_size, leaves)),
        bytes=sum(map(_bytes, leaves)),
    )


def _size(leaf: Any) -> int:
    return int(np.prod(leaf.shape))


def _bytes(leaf: Any) -> int:
    return _size(leaf) * leaf.dtype.itemsize
