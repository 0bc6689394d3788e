import pytest


@pytest.fixture(scope="session", autouse=True)
def library(cpu_kernels):
    """Every test here needs the library."""
