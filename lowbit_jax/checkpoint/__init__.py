"""Checkpoints that load without the code that trained them: an orbax tree and a manifest."""

from lowbit_jax.checkpoint.digests import digest
from lowbit_jax.checkpoint.manifest import SCHEMA, read_manifest
from lowbit_jax.checkpoint.store import load, save, save_async

__all__ = ["SCHEMA", "digest", "load", "read_manifest", "save", "save_async"]
