"""Real text for tests, from a folder beside the checkout."""

import os
import pathlib

import pytest

_BESIDE_CHECKOUT = pathlib.Path(__file__).resolve().parents[3] / "shared" / "assets"


@pytest.fixture(scope="session")
def assets() -> pathlib.Path:
    """The folder of real models and data: $LOWBIT_ASSETS, or ../shared/assets beside the checkout.

    Elsewhere a test that needs it is skipped; in CI, where it must be there, the test fails.
    """
    folder = pathlib.Path(os.environ.get("LOWBIT_ASSETS") or _BESIDE_CHECKOUT)
    if not folder.is_dir():
        reason = f"no assets in {folder}; set LOWBIT_ASSETS to their folder"
        if os.environ.get("CI") == "true":
            pytest.fail(reason)
        pytest.skip(reason)
    return folder
