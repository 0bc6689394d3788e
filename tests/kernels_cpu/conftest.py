import os
import shutil

import pytest

import kernels_cpu


@pytest.fixture(scope="session", autouse=True)
def library():
    """The compiled library, which has to be there wherever a compiler is."""
    if reason := kernels_cpu.missing():
        if os.environ.get("CI") == "true" or shutil.which("c++"):
            pytest.fail(reason)
        pytest.skip(reason)
