"""Environments of other libraries, each made once outside of the project's own.

They lie in LOWBIT_PEERS (default: ~/.cache/lowbit_jax/peers) and stay there. Making them takes
packages, a Python for which torch has a wheel (LOWBIT_PEER_PYTHON, or a python3.11 that is found),
and for llama.cpp cmake, a C++ compiler and a quarter of an hour of two cores.
"""

import hashlib
import json
import os
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

READERS = Path(__file__).parent / "readers"
# gptqmodel asks for a newer torch than what it is read with here needs.
TORCH = [
    ["torch==2.13.0", "transformers==5.24.0", "compressed-tensors==0.20.0", "accelerate"],
    ["device-smi", "pypcre", "tokenicer", "logbar", "defuser", "threadpoolctl", "pillow"],
    ["protobuf", "setuptools"],
    ["--no-deps", "--no-build-isolation", "gptqmodel==7.7.0"],
]
# Warnings and vision off, -O1: half of the time of the default build.
LLAMA = [
    [
        "--no-binary=llama-cpp-python",
        "llama-cpp-python==0.3.36",
        "-Ccmake.define.LLAVA_BUILD=OFF",
        "-Ccmake.define.LLAMA_ALL_WARNINGS=OFF",
        "-Ccmake.define.LLAMA_OPENSSL=OFF",
        "-Ccmake.define.GGML_OPENMP=OFF",
        "-Ccmake.define.CMAKE_CXX_FLAGS_RELEASE=-O1 -DNDEBUG",
    ]
]

Run = Callable[..., dict[str, np.ndarray]]


def python() -> str:
    """An interpreter for the environments."""
    named = os.environ.get("LOWBIT_PEER_PYTHON")
    found = sorted(Path.home().glob(".pyenv/versions/3.11*/bin/python"))
    for candidate in (named, shutil.which("python3.11"), *map(str, found)):
        if candidate and Path(candidate).is_file():
            return candidate
    pytest.skip("no Python 3.11 is here; LOWBIT_PEER_PYTHON names one")


def environment(name: str, installs: list[list[str]]) -> Path:
    """The interpreter of an environment, made if it is not there yet; skips with the reason."""
    base = Path(os.environ.get("LOWBIT_PEERS", Path.home() / ".cache/lowbit_jax/peers"))
    folder = base / f"{name}-{hashlib.sha256(json.dumps(installs).encode()).hexdigest()[:12]}"
    if not (folder / "complete").exists():
        shutil.rmtree(folder, ignore_errors=True)
        commands = [[python(), "-m", "venv", str(folder)]]
        commands += [[str(folder / "bin/pip"), "install", *install] for install in installs]
        variables = os.environ | {"CMAKE_BUILD_PARALLEL_LEVEL": "2", "BUILD_CUDA_EXT": "0"}
        for command in commands:
            run = subprocess.run(["nice", *command], env=variables, capture_output=True, text=True)
            if run.returncode:
                last = (run.stderr or run.stdout).strip().splitlines()[-1:]
                pytest.skip(f"{name}: {' '.join(command[:4])} failed: {last}")
        (folder / "complete").touch()
    return folder / "bin/python"


@pytest.fixture(scope="session")
def reader(tmp_path_factory) -> Callable[[Path, str], Run]:
    """Runs readers/NAME.py in an environment: keywords are its job, arrays are what it found."""

    def made(interpreter: Path, name: str) -> Run:
        def run(**job: Any) -> dict[str, np.ndarray]:
            out = tmp_path_factory.mktemp("read") / "out.npz"
            text = json.dumps({key: str(v) if isinstance(v, Path) else v for key, v in job.items()})
            command = [str(interpreter), str(READERS / f"{name}.py"), text, str(out)]
            done = subprocess.run(command, capture_output=True, text=True)
            assert done.returncode == 0, done.stderr[-3000:]
            with np.load(out) as found:
                return dict(found)

        return run

    return made


@pytest.fixture(scope="session")
def torch_reader(reader) -> Callable[[str], Run]:
    """Readers with transformers, compressed-tensors and gptqmodel on the CPU."""
    interpreter = environment("torch", TORCH)
    return lambda name: reader(interpreter, name)


@pytest.fixture(scope="session")
def llama_reader(reader) -> Callable[[str], Run]:
    """Readers with llama.cpp."""
    interpreter = environment("llama", LLAMA)
    return lambda name: reader(interpreter, name)
