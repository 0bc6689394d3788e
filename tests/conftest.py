"""Every test runs on 8 virtual CPU devices and with implicit rank promotion forbidden."""

import collections
import os
import shutil
import sys
import tempfile

# Before jax starts: all are read once.
os.environ.setdefault("JAX_PLATFORMS", "cpu")
_DEVICES = "--xla_force_host_platform_device_count=8"
if _DEVICES not in os.environ.get("XLA_FLAGS", ""):
    os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} {_DEVICES}".strip()
# Workers, and the programs that tests start, share what one of them has compiled: compiling is most
# of the suite's time, and many tests compile the same. The first process makes the folder.
_COMPILED = "JAX_COMPILATION_CACHE_DIR"
_OWN_FOLDER = "" if _COMPILED in os.environ else tempfile.mkdtemp(prefix="lowbit-compiled-")
if _OWN_FOLDER:
    os.environ[_COMPILED] = f"{_OWN_FOLDER}/xla"
    os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0.1"
    # So with Python's: where none is kept (as in many containers), jax takes 5 s longer to import.
    if os.environ.pop("PYTHONDONTWRITEBYTECODE", ""):
        os.environ["PYTHONPYCACHEPREFIX"] = sys.pycache_prefix = f"{_OWN_FOLDER}/python"
        sys.dont_write_bytecode = False
os.environ["JAX_DISABLE_MOST_OPTIMIZATIONS"] = "1"  # see the fixture `optimizations`

from pathlib import Path  # noqa: E402

import hypothesis  # noqa: E402
import jax  # noqa: E402
import pytest  # noqa: E402

import kernels_cpu  # noqa: E402

jax.config.update("jax_numpy_rank_promotion", "raise")

# A first example compiles, so that deadlines say nothing; in CI the examples are always the same.
hypothesis.settings.register_profile("lowbit", deadline=None, derandomize="CI" in os.environ)
hypothesis.settings.load_profile("lowbit")


# Where tests compare the bits of one program with those of another, or count instructions.
# Elsewhere XLA's and LLVM's optimizations take longer than what they speed up, and are off.
# Programs that tests start do as the tests.
_OPTIMIZED = (
    "experiments/test_aot.py", "generation/test_quantized_cache.py", "kernels_cpu/",
    "kernels_pallas/test_rounding.py", "laws/", "nn/", "ops/test_integer.py",
    "ops/test_lookup.py", "ops/test_matmul.py", "ops/test_packed_attention.py", "optimizers/",
    "quantizers/test_in_layers.py", "quantizers/test_learned.py", "quantizers/test_ranges.py",
    "test_estimators.py", "test_packing.py", "test_surgery.py",
)  # fmt: skip


def _optimized(path: Path) -> bool:
    return path.relative_to(Path(__file__).parent).as_posix().startswith(_OPTIMIZED)


def pytest_collection_modifyitems(items):
    """Optimized tests first, so that a worker changes over once; then the longest files.

    Files that start programs have few tests and long ones.
    """
    tests = collections.Counter(item.path for item in items)

    def place(item):
        starts = "experiments" in item.path.parts or item.path.name == "test_notebook.py"
        return not _optimized(item.path), not starts, -tests[item.path], item.path

    items.sort(key=place)


def pytest_unconfigure():
    """The process that made the folder of compiled programs removes it."""
    if _OWN_FOLDER:
        shutil.rmtree(_OWN_FOLDER, ignore_errors=True)


@pytest.fixture(scope="module", autouse=True)
def optimizations(request):
    """On in the tests of `_OPTIMIZED` alone."""
    off = not _optimized(request.path)
    if jax.config.read("jax_disable_most_optimizations") != off:
        jax.clear_caches()  # jax would go on with what it has compiled the other way
        jax.config.update("jax_disable_most_optimizations", off)
    os.environ["JAX_DISABLE_MOST_OPTIMIZATIONS"] = str(int(off))  # of programs that tests start


@pytest.fixture(scope="module")
def strict_dtypes():
    """Implicit dtype promotion is an error, for the floors below flax."""
    with jax.numpy_dtype_promotion("strict"):
        yield


@pytest.fixture(scope="session")
def assets() -> Path:
    """The folder of real models and texts: LOWBIT_ASSETS, or beside the checkout."""
    beside = Path(__file__).parents[2] / "shared" / "assets"
    folder = Path(os.environ.get("LOWBIT_ASSETS", beside))
    if not folder.is_dir():
        reason = f"no assets at {folder}; set LOWBIT_ASSETS to the folder with stories260k/ etc."
        if os.environ.get("CI") == "true":
            pytest.fail(reason)
        pytest.skip(reason)
    return folder


@pytest.fixture(scope="session")
def cpu_kernels():
    """The compiled CPU kernels, which have to be there wherever a compiler is."""
    if reason := kernels_cpu.missing():
        if any(shutil.which(name) for name in ("c++", "g++", "clang++")):
            pytest.fail(reason)
        pytest.skip(reason)
