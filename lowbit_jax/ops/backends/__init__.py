"""What computes a packed product: one module per backend, all of the same form.

why_not(meta, act)                  why the backend does not compute it here; None: it does
prepare_words(words, meta)          the planes of a QTensor in the backend's order
canonical_words(words, meta)        the inverse
product(x, matrix, act, out_dtype)  x [M, K] @ matrix; `act` names the rounding of x
columns(words, meta, at)            canonical words of some columns, for lookups
"""

import functools
import warnings
from typing import Any, Final

import jax

import kernels_cpu
from lowbit_jax.ops.backends import cpu, mosaic, xla

_BACKENDS: Final[dict[str, Any]] = {
    "cpu": cpu,
    "mosaic_gpu": mosaic.GPU,
    "mosaic_tpu": mosaic.TPU,
    "xla": xla,
}
_OF_PLATFORM: Final = {"cpu": "cpu", "gpu": "mosaic_gpu", "tpu": "mosaic_tpu"}


def get(name: str) -> Any:
    """The backend of that name.

    Raises:
        ValueError: There is none.
    """
    if name not in _BACKENDS:
        raise ValueError(f"{name!r} is not a backend. Backends: {sorted(_BACKENDS)}.")
    return _BACKENDS[name]


def choose(meta: Any, act: str | None) -> str:
    """The backend for a matrix on the platform that jax uses by default.

    The platform's own kernels where they exist and compute it, else XLA, whose form is the
    definition.
    """
    name = _OF_PLATFORM.get(jax.default_backend(), "xla")
    if name == "cpu" and (reason := kernels_cpu.missing()):
        _say_once(reason)
    return "xla" if _why_not(name, meta, act) else name


@functools.cache
def _say_once(reason: str) -> None:
    warnings.warn(
        f"packed products run on XLA, some ten times slower than the CPU kernels: {reason}",
        stacklevel=2,
    )


@functools.cache
def _why_not(name: str, meta: Any, act: str | None) -> str | None:
    return get(name).why_not(meta, act)
