"""Loads the compiled library, once, when it is first asked for."""

import ctypes
import functools
import os
from pathlib import Path

import jax

TARGET = "lowbit_cpu_matmul"
_HERE = Path(__file__).parent


@functools.cache
def _load() -> tuple[ctypes.CDLL | None, str]:
    """(the library, registered with XLA, "") or (None, why there is none)."""
    # Another build, one with sanitizers say, can be put in its place.
    path = Path(os.environ.get("LOWBIT_CPU_LIBRARY") or _HERE / "liblowbit_cpu.so")
    if not path.exists():
        return None, (
            f"{path} does not exist: there was no C++ compiler when the package was installed. "
            "Install one and run `python -m kernels_cpu.build`."
        )
    try:
        library = ctypes.cdll.LoadLibrary(str(path))
    except OSError as error:
        return None, f"{path} cannot be loaded ({error}). Run `python -m kernels_cpu.build`."
    jax.ffi.register_ffi_target(TARGET, jax.ffi.pycapsule(library.LowbitCpuMatmul), platform="cpu")
    library.LowbitCpuInstructionSet.restype = ctypes.c_char_p
    return library, ""


def missing() -> str | None:
    """Why there are no CPU kernels in this installation; None if there are."""
    return _load()[1] or None


def instruction_set() -> str:
    """The instruction set that the kernels use here: "avx512", "avx2", "neon" or "portable".

    Raises:
        NotImplementedError: There are no kernels; the message says why.
    """
    library, reason = _load()
    if library is None:
        raise NotImplementedError(f"CPU kernels: {reason}")
    return library.LowbitCpuInstructionSet().decode()
