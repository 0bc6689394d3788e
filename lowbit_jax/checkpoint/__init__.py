"""Checkpoints that load without the code that trained them: an orbax tree and a manifest."""

from lowbit_jax.checkpoint.manifest import SCHEMA, read_manifest
from lowbit_jax.checkpoint.store import load, save

__all__ = ["SCHEMA", "load", "read_manifest", "save"]
