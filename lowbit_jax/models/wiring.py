"""Which layer feeds which: the small table that transforms of PTQ fold their scales by.

A transform that divides the inputs of some layers by a vector has to multiply it into whatever
makes these inputs. A `Wiring` says what that is, for one block of a model; the models of this
library have theirs here, and a user's own model passes its own.
"""

import dataclasses
from typing import Any

import jax.numpy as jnp
from flax import nnx

from lowbit_jax.models.cnn import CNN
from lowbit_jax.models.decoder import Decoder
from lowbit_jax.models.resnet import ResNet


@dataclasses.dataclass(frozen=True)
class Link:
    """One array that is made by `source` and enters `targets`, and nothing else.

    Paths are inside a block.

    Attributes:
        source: A norm (its scale, and bias if any, are per feature), or a linear layer (the columns
            of its kernel), between which and the targets every feature keeps its place.
        targets: The layers it enters.
        repeats: How often each group of `group` features of the source stands in the target, side
            by side: grouped-query attention's values, `heads // kv_heads` times; else 1.
        group: Features of one repeated group (the head size); None where nothing is repeated.
        linear: Whether the targets are a linear function of the source's output, so that it may
            also be rotated; SwiGLU's `up` to `down` is one feature by feature only.
    """

    source: str
    targets: tuple[str, ...]
    repeats: int = 1
    group: int | None = None
    linear: bool = True


@dataclasses.dataclass(frozen=True)
class Wiring:
    """What a block-wise transform needs to know of a model.

    Attributes:
        links: Inside one block.
        writers: Layers of a block that add to the residual stream.
        post_norms: Norms of a block between a writer and the residual stream.
        readers: (norm, layers behind it) of a block that read the residual stream.
        embedding: Path in the model of what starts the residual stream.
        head: (norm, layer) paths in the model that read it last; the layer None where the head is
            tied to the embedding.
        heads: Query heads; 0 if there is no attention.
        kv_heads: Key and value heads.
        head_size: Features of one head.
        values: Path in a block of the value projection, "" if there is none.
        outputs: Path in a block of the attention's output projection.
        hidden: Path in a block of the layer that reads the feed-forward's hidden features.
        batch_norms: (layer, batch norm behind it) paths in the model.
    """

    links: tuple[Link, ...] = ()
    writers: tuple[str, ...] = ()
    post_norms: tuple[str, ...] = ()
    readers: tuple[tuple[str, tuple[str, ...]], ...] = ()
    embedding: str = ""
    head: tuple[str, str | None] | None = None
    heads: int = 0
    kv_heads: int = 0
    head_size: int = 0
    values: str = ""
    outputs: str = ""
    hidden: str = ""
    batch_norms: tuple[tuple[str, str], ...] = ()


def wiring_of(model: nnx.Module) -> Wiring | None:
    """The wiring of a model of this library; None for any other."""
    if isinstance(model, Decoder):
        return _decoder(model.config)
    if isinstance(model, ResNet):
        return _resnet(sum(model.config.blocks))
    if isinstance(model, CNN):
        stages = range(len(model.config.channels))
        return Wiring(batch_norms=tuple((f"layers/{i}/conv", f"layers/{i}/norm") for i in stages))
    return None


def with_structure(model: nnx.Module, **changes: Any) -> nnx.Module:
    """A clone whose configuration tells of a change of structure, where its family has the fields.

    A checkpoint of a registered family is rebuilt from its configuration alone.
    """
    clone: Any = nnx.clone(model)
    config: Any = getattr(clone, "config", None)
    known = {f.name for f in dataclasses.fields(config)} if config is not None else set()
    if known >= set(changes):
        clone.config = dataclasses.replace(config, **changes)
    return clone


def untied(model: nnx.Module) -> nnx.Module:
    """A model of the same function whose head, tied so far, has a kernel of its own.

    Raises:
        NotImplementedError: A model of another library: only its author knows how.
    """
    if not isinstance(model, Decoder):
        raise NotImplementedError(
            f"{type(model).__name__}: its head is tied to its embedding, and only decoders of this "
            "library can be untied. Give it a head of its own, a copy of the embedding."
        )
    config = model.config
    clone: Any = with_structure(model, tied=False)
    clone.head = nnx.Linear(
        config.dim,
        config.vocab,
        use_bias=False,
        dtype=config.compute_dtype,
        preferred_element_type=jnp.float32,
        kernel_init=nnx.initializers.zeros_init(),
        rngs=nnx.Rngs(0),
    )
    clone.head.kernel[...] = model.embed.embedding[...].T
    return clone


def _decoder(config: Any) -> Wiring:
    projections = ("attention/query", "attention/key", "attention/value")
    readers = (("attention_norm", projections), ("mlp_norm", ("mlp/gate", "mlp/up")))
    links = [Link(norm, layers) for norm, layers in readers]
    if config.sub_norm:
        links += [
            Link("attention/out_norm", ("attention/out",)),
            Link("mlp/down_norm", ("mlp/down",)),
        ]
    else:
        repeats = config.heads // config.kv_heads
        links += [
            Link("attention/value", ("attention/out",), repeats, config.head_size),
            Link("mlp/up", ("mlp/down",), linear=False),
        ]
    return Wiring(
        links=tuple(links),
        writers=("attention/out", "mlp/down"),
        post_norms=("attention_post_norm", "mlp_post_norm") if config.post_norm else (),
        readers=readers,
        embedding="embed",
        head=("norm", None if config.tied else "head"),
        heads=config.heads,
        kv_heads=config.kv_heads,
        head_size=config.head_size,
        values="" if config.sub_norm else "attention/value",
        outputs="attention/out",
        hidden="mlp/down",
    )


def _resnet(blocks: int) -> Wiring:
    pairs = [("conv", "norm")]
    for i in range(blocks):
        pairs += [(f"layers/{i}/conv{j}", f"layers/{i}/norm{j}") for j in (1, 2)]
    # Once the norms are folded, only a ReLU is in between, which lets positive factors through.
    link = Link("conv1", ("conv2",), linear=False)
    return Wiring(links=(link,), batch_norms=tuple(pairs))
