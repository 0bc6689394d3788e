"""QuaRot's rotations: the features of a transformer turned until none of them is an outlier.

RMSNorm commutes with a rotation once its scale has been folded into what reads it: norm(x R) =
norm(x) R. The residual stream can then be turned as a whole, in the weights alone: what writes into
it is multiplied by R, what reads it by R^T. Inside a head, values and the output projection turn
against each other in the same way. Where something that is not linear stands in between (the gate
in front of `down`), or heads are to be mixed, the rotation is computed when the model runs: an
explicit module in front of the layer (`lowbit_jax.models.rotation`), which is all that inference
pays.
"""

import dataclasses
from collections.abc import Callable
from typing import Any, ClassVar, Literal, override

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array

from lowbit_jax.models.rotation import (
    Rotated,
    Rotation,
    apply_hadamard,
    hadamard_base,
    random_orthogonal,
)
from lowbit_jax.models.wiring import Wiring, untied, with_structure
from lowbit_jax.ptq.layers import get_matrix, set_matrix
from lowbit_jax.ptq.stage import ModelWork, Stage
from lowbit_jax.ptq.transforms.folding import multiply_inputs, require_wiring, set_bias
from lowbit_jax.walk import layers, rebuilt

Turn = Callable[[Array], Array]
"""Rows x to x R."""


@dataclasses.dataclass(frozen=True)
class Rotate(Stage):
    """QuaRot's rotations (arXiv:2404.00456, section 4, stage 1).

    Differences: no mean is subtracted from the embedding (the authors' program does, which is no
    identity under RMSNorm); keys and queries are not rotated, since no cache is quantized here. A
    size of which no Hadamard matrix is built here gets a random orthogonal one, which a message
    says. A tied head is untied if the last norm's scales differ, since they cannot then be folded
    into the head without changing the embedding.

    Attributes:
        kind: Of the residual stream's and the values' matrix: "hadamard" (the former with random
            signs) or "random" (orthogonal).
        seed: Of everything random.
        residual: Whether the residual stream is rotated.
        values: Whether values are rotated inside each head.
        heads: Whether heads are mixed in front of the attention's output projection (online).
        down: Whether the feed-forward's hidden features are rotated (online).
    """

    kind: Literal["hadamard", "random"] = "hadamard"
    seed: int = 0
    residual: bool = True
    values: bool = True
    heads: bool = True
    down: bool = True

    transforms: ClassVar[bool] = True

    def __post_init__(self):
        if self.kind not in ("hadamard", "random"):
            raise ValueError(f"Rotate(kind={self.kind!r}): the kinds are ['hadamard', 'random'].")

    @override
    def prepare(self, work: ModelWork) -> nnx.Module:
        wiring = require_wiring("Rotate", work.wiring)
        blocks = _blocks(work.model, wiring)
        model = nnx.clone(work.model)
        keys = list(jax.random.split(jax.random.key(self.seed), 4))
        if self.residual:
            model, head = _with_plain_head(model, wiring)
            width = get_matrix(dict(layers(model))[wiring.embedding]).shape[-2]
            turn = self._turn(work, width, keys[0], signs=True)
            _rotate_residual(model, wiring, head, blocks, turn)
        if self.values and wiring.values:
            turn = self._turn(work, wiring.head_size, keys[1], signs=False)
            _rotate_values(model, wiring, blocks, turn)
        online = {}
        if self.heads and wiring.values and wiring.heads > 1:
            online[wiring.outputs] = _rotation(work, wiring.heads, wiring.head_size, keys[2])
        if self.down and wiring.hidden:
            size = get_matrix(dict(layers(model))[f"{blocks[0]}/{wiring.hidden}"]).shape[-2]
            online[wiring.hidden] = _rotation(work, size, 1, keys[3])
        if not online:
            return model
        _rename(work, [f"{block}/{path}" for block in blocks for path in online])
        return _with_online(model, blocks, online)

    def _turn(self, work: ModelWork, size: int, key: Array, *, signs: bool) -> Turn:
        if self.kind == "hadamard" and hadamard_base(size) is not None:
            if not signs:
                return apply_hadamard
            # Random signs, so that no pattern of the weights meets its own row of the matrix.
            flips = jax.random.rademacher(key, (size,), jnp.float32)
            return lambda x: apply_hadamard(x * flips.reshape(*(1,) * (x.ndim - 1), size))
        if self.kind == "hadamard":
            _announce(work, size)
        matrix = jnp.asarray(random_orthogonal(size, key), jnp.float32)
        return lambda x: jnp.einsum("...m,mn->...n", x, matrix, precision=jax.lax.Precision.HIGHEST)


def turn_inputs(layer: Any, turn: Turn) -> None:
    """W becomes R^T W in place, for inputs x R instead of x; an embedding's features become x R."""
    columns = get_matrix(layer).astype(jnp.float32).swapaxes(-1, -2)
    set_matrix(layer, turn(columns).swapaxes(-1, -2))


def turn_outputs(layer: Any, turn: Turn) -> None:
    """W becomes W R and b becomes b R in place: outputs y R instead of y."""
    set_matrix(layer, turn(get_matrix(layer).astype(jnp.float32)))
    if getattr(layer, "bias", None) is not None:
        set_bias(layer, turn(layer.bias[...].astype(jnp.float32).reshape(-1)))


def _announce(work: ModelWork, size: int) -> None:
    text = (
        f"Rotate: no Hadamard matrix of order {size} is known here; it is a random orthogonal one."
    )
    work.emit("message", text=text)


def _rotation(work: ModelWork, size: int, inner: int, key: Array) -> Rotation:
    if hadamard_base(size) is not None:
        return Rotation(size, inner)
    _announce(work, size)
    return Rotation(size, inner, jnp.asarray(random_orthogonal(size, key), jnp.float32))


def _blocks(model: nnx.Module, wiring: Wiring) -> list[str]:
    """Paths of the blocks: where the wiring's first norm is found."""
    if not wiring.readers:
        raise ValueError("Rotate: the wiring has no `readers`: nothing says what reads the stream.")
    end = f"/{wiring.readers[0][0]}"
    found = [path.removesuffix(end) for path, _ in layers(model) if path.endswith(end)]
    if not found:
        raise ValueError(f"Rotate: the wiring names {end[1:]!r}, which no block of this model has.")
    return found


def _with_plain_head(model: nnx.Module, wiring: Wiring) -> tuple[nnx.Module, str | None]:
    """The model with a head that can take the last norm's scale, if it needs one; its path."""
    if wiring.head is None:
        raise ValueError("Rotate: the wiring has no `head`: nothing says what reads last.")
    norm, head = wiring.head
    scale = getattr(dict(layers(model))[norm], "scale", None)
    if head is not None or scale is None or bool(jnp.all(scale[...] == scale[0])):
        return model, head
    return untied(model), "head"


def _rotate_residual(
    model: nnx.Module, wiring: Wiring, head: str | None, blocks: list[str], turn: Turn
) -> None:
    """Folds the norms' scales and turns the residual stream, in place."""
    assert wiring.head is not None
    if wiring.post_norms:
        raise NotImplementedError(
            f"Rotate: {wiring.post_norms[0]} stands between a layer and the residual stream, and "
            "its scales do not commute with a rotation. Use residual=False."
        )
    modules: dict[str, Any] = dict(layers(model))
    readers = [
        (f"{block}/{norm}", [f"{block}/{path}" for path in paths])
        for block in blocks
        for norm, paths in wiring.readers
    ]
    readers.append((wiring.head[0], [] if head is None else [head]))
    for norm, paths in readers:
        if not isinstance(modules[norm], nnx.RMSNorm):
            raise NotImplementedError(
                f"Rotate: {norm} is a {type(modules[norm]).__name__}; only RMSNorm commutes with a "
                "rotation. Use residual=False."
            )
        # A tied head takes no scale: its norm keeps the one that all its features share.
        if paths:
            _fold_norm(modules[norm], [modules[path] for path in paths])
        for path in paths:
            turn_inputs(modules[path], turn)
    turn_inputs(modules[wiring.embedding], turn)
    for path in (f"{block}/{path}" for block in blocks for path in wiring.writers):
        turn_outputs(modules[path], turn)


def _fold_norm(norm: Any, readers: list[Any]) -> None:
    if norm.scale is None:
        return
    scale = norm.scale[...].astype(jnp.float32)
    for layer in readers:
        multiply_inputs(layer, scale)
    norm.scale[...] = jnp.ones_like(norm.scale[...])


def _rotate_values(model: nnx.Module, wiring: Wiring, blocks: list[str], turn: Turn) -> None:
    """Turns every value head, and the output projection's rows of every query head, against it."""

    def by_head(x: Array) -> Array:
        heads = x.reshape(*x.shape[:-1], -1, wiring.head_size)
        return turn(heads).reshape(x.shape)

    modules = dict(layers(model))
    for block in blocks:
        turn_outputs(modules[f"{block}/{wiring.values}"], by_head)
        turn_inputs(modules[f"{block}/{wiring.outputs}"], by_head)


def _with_online(model: nnx.Module, blocks: list[str], online: dict[str, Rotation]) -> nnx.Module:
    """The model with rotations in front of these layers of every block."""
    at = {f"{block}/{path}": rotation for block in blocks for path, rotation in online.items()}

    def wrap(path: str, module: Any) -> Any:
        if path not in at:
            return module
        turn_inputs(module, at[path])
        return Rotated(module, nnx.clone(at[path]))

    return with_structure(rebuilt(model, wrap), online=tuple(online))


def _rename(work: ModelWork, paths: list[str]) -> None:
    """Moves the schemes of wrapped layers to where the layers now stand, in their old order."""
    moved = {path: f"{path}/linear" for path in paths}
    entries = {moved.get(path, path): scheme for path, scheme in work.schemes.items()}
    work.schemes.clear()
    work.schemes.update(entries)
