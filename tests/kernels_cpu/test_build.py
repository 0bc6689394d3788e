"""What happens without a compiler, with one that fails, and without the library."""

import os
import subprocess
import sys

import pytest

from kernels_cpu import build

WITHOUT = """
import warnings
import jax.numpy as jnp
import lowbit_jax as lb
q = lb.quantize(jnp.ones((64, 16)), lb.presets["w4a16"].weight.spec)
with warnings.catch_warnings(record=True) as said:
    warnings.simplefilter("always")
    for _ in range(2):
        assert lb.matmul(jnp.ones((2, 64)), q).shape == (2, 16)
print(len(said), said[0].message)
try:
    lb.matmul(jnp.ones((2, 64)), q, implementation="cpu")
except NotImplementedError as error:
    print(error)
"""


def test_without_a_compiler_the_error_says_where_it_looked(monkeypatch, tmp_path):
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setenv("CXX", "no-such-compiler")
    with pytest.raises(build.NoCompiler, match=r"neither \$CXX nor c\+\+, g\+\+ or clang\+\+"):
        build.build(tmp_path / "library.so")


def test_a_failed_build_leaves_the_library_that_was_there(monkeypatch, tmp_path):
    library = tmp_path / "library.so"
    library.write_text("the last one")
    monkeypatch.setenv("CXX", sys.executable)  # which is no compiler
    with pytest.raises(RuntimeError, match="-std=c\\+\\+17"):
        build.build(library)
    assert library.read_text() == "the last one"
    assert list(tmp_path.iterdir()) == [library]


def test_without_the_library_xla_computes_and_says_so_once(tmp_path):
    missing = tmp_path / "none.so"
    environment = os.environ | {"LOWBIT_CPU_LIBRARY": str(missing)}
    run = subprocess.run(
        [sys.executable, "-c", WITHOUT], env=environment, capture_output=True, text=True
    )
    assert run.returncode == 0, run.stderr
    said, refused = run.stdout.strip().splitlines()
    assert said.startswith("1 packed products run on XLA")
    assert "python -m kernels_cpu.build" in said
    assert "implementation 'cpu' does not compute" in refused
    assert str(missing) in refused
