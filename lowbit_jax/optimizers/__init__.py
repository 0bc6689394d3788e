"""Quantization as a part of the optimizer: transformations for optax."""

from lowbit_jax.optimizers.clipping import clip_latent
from lowbit_jax.optimizers.incremental import IncrementalState, incremental, partitions
from lowbit_jax.optimizers.parq import (
    ParqState,
    inverse_slope,
    latent_params,
    parq,
    proximal_map,
)

__all__ = [
    "IncrementalState",
    "ParqState",
    "clip_latent",
    "incremental",
    "inverse_slope",
    "latent_params",
    "parq",
    "partitions",
    "proximal_map",
]
