"""Every test runs on 8 virtual CPU devices and with implicit rank promotion forbidden."""

import os
import shutil

# Before jax starts: both are read once, when the backend is created.
os.environ.setdefault("JAX_PLATFORMS", "cpu")
_DEVICES = "--xla_force_host_platform_device_count=8"
if _DEVICES not in os.environ.get("XLA_FLAGS", ""):
    os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} {_DEVICES}".strip()

from pathlib import Path  # noqa: E402

import hypothesis  # noqa: E402
import jax  # noqa: E402
import pytest  # noqa: E402

import kernels_cpu  # noqa: E402

jax.config.update("jax_numpy_rank_promotion", "raise")

# A first example compiles, so that deadlines say nothing; in CI the examples are always the same.
hypothesis.settings.register_profile("lowbit", deadline=None, derandomize="CI" in os.environ)
hypothesis.settings.load_profile("lowbit")


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
