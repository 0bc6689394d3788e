"""`attend(query, keys, values)`: attention over packed keys and values, whatever computes it."""

from typing import Any, Final, Literal

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int32

import kernels_pallas
from lowbit_jax.formats import FP8_E4M3, INT4, INT8
from lowbit_jax.ops import packed_attention as over
from lowbit_jax.ops.packed_attention import PerPosition
from lowbit_jax.qtensor import QTensor

Implementation = Literal["mosaic_gpu", "mosaic_tpu", "xla", "interpret"]
_NAMES: Final = ("mosaic_gpu", "mosaic_tpu", "xla", "interpret")
_PLATFORMS: Final = {"mosaic_gpu": "gpu", "mosaic_tpu": "tpu"}
_OF_PLATFORM: Final = {"gpu": "mosaic_gpu", "tpu": "mosaic_tpu"}
_FORMATS: Final = {INT8: "int8", INT4: "int4", FP8_E4M3: "fp8"}


def attend(
    query: Float[Array, "batch new heads head_dim"],
    keys: QTensor,
    values: QTensor,
    length: Int32[Array, ""] | int,
    *,
    window: int = 0,
    scale: float | None = None,
    softcap: float | None = None,
    implementation: Implementation | None = None,
) -> Float[Array, "batch new heads head_dim"]:
    """Softmax attention of the last `new` of `length` positions over those before, and themselves.

    Args:
        query: Head `h` asks the key head `h // (heads // kv_heads)`.
        keys: [batch, capacity, kv_heads, head_dim] with one scale per position and head
            (`PerToken`).
        values: As `keys`.
        length: Positions held, those of the query included.
        window: Positions that a token sees, its own included; 0: all before it.
        scale: Factor of the scores; None: `head_dim ** -0.5`.
        softcap: Scores s become `softcap * tanh(s / softcap)` (arXiv:2408.00118).
        implementation: "mosaic_gpu" or "mosaic_tpu" (a kernel that reads the packed words once, for
            one new position), "interpret" (the TPU's in Pallas' interpreter), or "xla" (decodes a
            stretch at a time). None chooses by platform and cache; a name obeys or raises.

    Returns:
        In the dtype of `query`. Products are of numbers of that dtype, sums in float32.

    Raises:
        ValueError: An unknown implementation, or keys with other scales.
        NotImplementedError: The named implementation does not compute this here; the message says
            why.
    """
    if implementation not in (None, *_NAMES):
        raise ValueError(
            f"attend: there is no implementation {implementation!r}. Implementations: "
            f"{list(_NAMES)}, or None."
        )
    for array in (keys, values):
        if array.scale.shape != (*array.shape[:-1], 1) or array.ndim != 4:
            raise ValueError(
                f"attend: {array.spec.describe()} of shape {array.shape} has scales of shape "
                f"{array.scale.shape}; one per position and head is needed."
            )
    name = implementation or _OF_PLATFORM.get(jax.default_backend(), "xla")
    reason = None if name == "xla" else _why_not(name, query, keys, values, scale, softcap)
    if reason is not None and implementation is not None:
        raise NotImplementedError(
            f"attend: implementation {name!r} does not compute this here: {reason}. "
            "implementation=None chooses one that does."
        )
    if name == "xla" or reason is not None:
        return _by_xla(query, keys, values, length, window, scale, softcap)
    interpret = name == "interpret"
    stop = jnp.minimum(jnp.asarray(length, jnp.int32), jnp.int32(keys.shape[1]))
    start = jnp.maximum(stop - jnp.int32(window), jnp.int32(0)) if window else 0
    y = kernels_pallas.attend(
        query[:, 0],
        (keys.words[0][..., 0], keys.plain_scale[..., 0]),
        (values.words[0][..., 0], values.plain_scale[..., 0]),
        start,
        stop,
        attention=_attention(query, keys, scale, softcap),
        backend="mosaic_tpu" if name == "interpret" else name,  # type: ignore[arg-type]
        interpret=interpret,
    )
    return y[:, None]


def _why_not(name: str, query: Any, keys: QTensor, values: QTensor, *options: Any) -> str | None:
    platform = _PLATFORMS.get(name)
    if platform is not None and jax.default_backend() != platform:
        return f"the default backend is {jax.default_backend()!r}, not {platform!r}"
    if query.shape[1] != 1:
        return f"{query.shape[1]} new positions; the kernels take one"
    if keys.spec.format not in _FORMATS or keys.spec != values.spec or not keys.spec.symmetric:
        return f"keys are {keys.spec.describe()}, values {values.spec.describe()}"
    backend: Any = "mosaic_tpu" if name == "interpret" else name
    return kernels_pallas.attend_unsupported(
        _attention(query, keys, *options), keys.shape[1], backend
    )


def _attention(query: Any, keys: QTensor, scale: Any, softcap: Any) -> kernels_pallas.Attention:
    width = query.shape[-1]
    return kernels_pallas.Attention(
        fmt=_FORMATS[keys.spec.format],  # type: ignore[arg-type]
        kv_heads=keys.shape[2],
        heads=query.shape[2],
        head_dim=width,
        scale=width**-0.5 if scale is None else scale,
        softcap=softcap,
    )


def _by_xla(
    query: Any, keys: QTensor, values: QTensor, length: Any, window: int, scale: Any, softcap: Any
) -> Array:
    """The definition: a stretch of positions dense at a time."""
    new, width = query.shape[1], query.shape[-1]
    positions = jnp.asarray(length, jnp.int32) - new + jnp.arange(new, dtype=jnp.int32)
    at = jnp.arange(keys.shape[1], dtype=jnp.int32)[None, :]
    seen = at <= positions[:, None]
    if window:
        seen &= at > positions[:, None] - window
    weights = over.joint_softmax(
        over.packed_scores(over.grouped(query, keys.shape[2]), PerPosition(keys)),
        seen,
        head_dim=width,
        scale=scale,
        softcap=softcap,
    )
    y = over.packed_sum(weights, PerPosition(values), query.dtype)
    return y.reshape(query.shape).astype(query.dtype)
