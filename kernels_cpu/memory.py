"""Huge pages under weights that are read once for every token.

Where a page ends after 4 KiB, the next one is looked up before anything of it can be fetched:
matrices of some hundred KB that are cold come at a fraction of the memory's rate. Linux (from 6.1)
gives memory that is already in use pages of 2 MiB when asked (`MADV_COLLAPSE`), whatever the
system's setting for new memory is. Elsewhere nothing happens.
"""

import ctypes
import functools
import sys
from collections.abc import Callable, Iterable
from typing import Any, Final

import jax

HUGE: Final = 2 << 20  # bytes of a huge page on x86-64, and on ARM64 with pages of 4 KiB
_COLLAPSE: Final = 25


@functools.cache
def _madvise() -> Callable[..., int] | None:
    if not sys.platform.startswith("linux"):
        return None
    function = ctypes.CDLL(None, use_errno=True).madvise
    function.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int)
    function.restype = ctypes.c_int
    return function


def settle(arrays: Iterable[Any]) -> int:
    """Asks for huge pages under arrays that stay; the bytes of those there are then.

    Only whole pages of 2 MiB can be had, so that what lies around an array comes along: contents do
    not change, and the process may hold up to 2 MiB more for each end. Tracers and arrays that are
    not whole on one CPU are passed over, and where the system declines nothing is said: it is a
    matter of speed alone.
    """
    madvise = _madvise()
    if madvise is None:
        return 0
    pages: set[int] = set()
    for array in arrays:
        if isinstance(array, jax.core.Tracer) or not isinstance(array, jax.Array):
            continue
        devices = array.devices()
        if len(devices) != 1 or next(iter(devices)).platform != "cpu" or array.nbytes == 0:
            continue
        start = array.unsafe_buffer_pointer()
        pages.update(range(start // HUGE, -(-(start + array.nbytes) // HUGE)))
    return sum(HUGE for page in sorted(pages) if madvise(page * HUGE, HUGE, _COLLAPSE) == 0)
