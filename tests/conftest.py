"""Every test runs on 8 virtual CPU devices and with implicit rank promotion forbidden."""

import os

# Before jax starts: both are read once, when the backend is created.
os.environ.setdefault("JAX_PLATFORMS", "cpu")
_DEVICES = "--xla_force_host_platform_device_count=8"
if _DEVICES not in os.environ.get("XLA_FLAGS", ""):
    os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} {_DEVICES}".strip()

import jax  # noqa: E402

jax.config.update("jax_numpy_rank_promotion", "raise")
