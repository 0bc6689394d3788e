"""Compiles the C++ sources: python -m kernels_cpu.build [--sanitize]

Every instruction set is a file with flags of its own, and the library chooses at run time, so that
one build serves every machine of an architecture. Runs when the package is installed, needs a C++17
compiler (`CXX`, or c++, g++, clang++ on the path) and nothing else.
"""

import argparse
import os
import platform
import shlex
import shutil
import subprocess
import tempfile
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

HERE = Path(__file__).parent
LIBRARY = HERE / "liblowbit_cpu.so"
FLAGS = ("-std=c++17", "-fPIC", "-fvisibility=hidden", "-ffp-contract=off", "-Wall", "-Wextra")
SANITIZE = (
    "-g",
    "-O1",
    "-DLOWBIT_ROLLED",
    "-fsanitize=address,undefined",
    "-fno-sanitize-recover=undefined",
)
# By machine; a source without an entry is compiled for the architecture's baseline.
INSTRUCTION_SETS: dict[str, dict[str, tuple[str, ...]]] = {
    "x86_64": {
        "avx2": ("-mavx2", "-mfma"),
        "avx512": ("-mavx512f", "-mavx512bw", "-mavx512vl", "-mavx512vnni", "-mavx2", "-mfma"),
    },
    "aarch64": {"neon": ("-march=armv8.2-a+dotprod",)},
    "arm64": {"neon": ("-march=armv8.2-a+dotprod",)},
}


class NoCompiler(RuntimeError):
    """There is no C++ compiler; the message says where it was looked for."""


def compiler() -> str:
    """The C++ compiler.

    Raises:
        NoCompiler: None was found.
    """
    for name in filter(None, (os.environ.get("CXX"), "c++", "g++", "clang++")):
        if found := shutil.which(shlex.split(name)[0]):
            return found
    raise NoCompiler("no C++ compiler: neither $CXX nor c++, g++ or clang++ on the path")


def build(out: Path = LIBRARY, *, flags: Sequence[str] = ("-O3",)) -> Path:
    """Compiles the library to `out`, which is replaced only when all of it compiled.

    Raises:
        NoCompiler: There is no compiler.
        RuntimeError: It failed; the message is its own.
    """
    cxx = compiler()
    extra = shlex.split(os.environ.get("CXXFLAGS", ""))
    sets = INSTRUCTION_SETS.get(platform.machine(), {})
    with tempfile.TemporaryDirectory(dir=out.parent) as folder:

        def compile_one(source: Path) -> str:
            target = str(Path(folder) / f"{source.stem}.o")
            include = ["-isystem", str(HERE / "third_party")]
            own = sets.get(source.stem, ())
            _run([cxx, *FLAGS, *flags, *own, *extra, *include, "-c", str(source), "-o", target])
            return target

        with ThreadPoolExecutor(os.cpu_count()) as pool:
            objects = list(pool.map(compile_one, sorted((HERE / "src").glob("*.cc"))))
        library = Path(folder) / out.name
        _run([cxx, "-shared", *flags, *objects, "-o", str(library)])
        library.replace(out)
    return out


def _run(command: list[str]) -> None:
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"{' '.join(command)}\n{done.stderr.strip()}")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--sanitize", action="store_true", help="with ASan and UBSan")
    parser.add_argument("--out", type=Path, default=LIBRARY, help="the library to write")
    given = parser.parse_args()
    print(build(given.out, flags=SANITIZE if given.sanitize else ("-O3",)))
