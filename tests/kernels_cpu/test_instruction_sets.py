"""Instruction sets that this machine may lack, emulated, and the kernels under sanitizers.

Each needs tools of its own and is skipped without them: g++ for AVX2; SIMDe's headers
(libsimde-dev) for AVX-512; a cross compiler and qemu (g++-aarch64-linux-gnu, qemu-user) for NEON;
libasan for the sanitizers. `uv run pytest -m slow tests/kernels_cpu`.
"""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from kernels_cpu import build

HERE = Path(__file__).parent
SOURCES = HERE.parents[1] / "kernels_cpu" / "src"
AVX512 = ("F", "BW", "VL", "VNNI")


def need(*names):
    for name in names:
        if shutil.which(name) is None:
            pytest.skip(f"{name} is not installed")


def agree(tmp_path, compiler, source, vector, flags, runner=()):
    """Compiles `agree.cc` for an instruction set and runs its 500 comparisons."""
    program = tmp_path / "agree"
    source_flags = [f'-DSOURCE="{source}"', f"-DVECTOR={vector}", f"-I{SOURCES}"]
    command = [compiler, "-std=c++17", *flags, *source_flags, HERE / "agree.cc"]
    command += [SOURCES / "portable.cc", "-o", program]
    compiled = subprocess.run(command, capture_output=True, text=True)
    assert compiled.returncode == 0, compiled.stderr
    run = subprocess.run([*runner, program], capture_output=True, text=True)
    assert run.stdout.endswith("500 cases, 0 wrong\n"), run.stdout


@pytest.mark.slow
def test_avx2(tmp_path):
    need("g++")
    if "avx2" not in Path("/proc/cpuinfo").read_text():
        pytest.skip("this machine has no AVX2")
    agree(tmp_path, "g++", "avx2.cc", "Avx2", ["-O2", "-mavx2", "-mfma"])


@pytest.mark.slow
def test_avx512_emulated(tmp_path):
    need("g++")
    if not Path("/usr/include/simde").exists():
        pytest.skip("SIMDe is not installed")
    macros = [f"-D__AVX512{name}__" for name in AVX512]
    # Unrolled, emulated vectors would take half an hour to compile.
    flags = ["-O1", f"-I{HERE / 'emulated'}", "-DLOWBIT_ROLLED", *macros]
    agree(tmp_path, "g++", "avx512.cc", "Avx512", flags)


@pytest.mark.slow
def test_neon_emulated(tmp_path):
    need("aarch64-linux-gnu-g++", "qemu-aarch64")
    flags = ["-O2", "-static", "-march=armv8.2-a+dotprod"]
    agree(tmp_path, "aarch64-linux-gnu-g++", "neon.cc", "Neon", flags, ["qemu-aarch64"])


@pytest.mark.slow
def test_address_and_undefined_behaviour_sanitizers(tmp_path):
    need("g++")
    # libstdc++ too, which the runtime looks for before jaxlib brings its own.
    runtimes = [
        subprocess.run(["g++", f"-print-file-name={name}"], capture_output=True, text=True)
        for name in ("libasan.so", "libstdc++.so")
    ]
    paths = [run.stdout.strip() for run in runtimes]
    if not all(Path(path).is_absolute() for path in paths):
        pytest.skip("libasan is not installed")
    library = build.build(tmp_path / "sanitized.so", flags=build.SANITIZE)
    environment = os.environ | {
        "LD_PRELOAD": " ".join(paths),
        # Python itself does not give everything back; a stack that jax switches looks like misuse.
        "ASAN_OPTIONS": "detect_leaks=0:detect_stack_use_after_return=0",
        "UBSAN_OPTIONS": "halt_on_error=1:print_stacktrace=1",
        "LOWBIT_CPU_LIBRARY": str(library),
    }
    command = [sys.executable, "-m", "pytest", "-q", "-n0", "-p", "no:cacheprovider"]
    run = subprocess.run(
        [*command, str(HERE / "test_matmul.py")], env=environment, capture_output=True, text=True
    )
    assert run.returncode == 0, run.stdout[-4000:] + run.stderr[-4000:]
