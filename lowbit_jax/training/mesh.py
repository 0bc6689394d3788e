"""Devices in a mesh (data, fsdp, tensor), and where state and batches lie on it.

The batch is cut over `data` and `fsdp`, parameters over `fsdp` and `tensor`; XLA adds the
communication. With both of the latter at 1 every device holds all parameters: plain data
parallelism.
"""

from collections.abc import Sequence
from typing import Any

import jax
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from lowbit_jax.models.sharding import param_shardings
from lowbit_jax.training.config import MeshConfig, TrainConfig

AXES = ("data", "fsdp", "tensor")


def make_mesh(config: MeshConfig, devices: Sequence[Any] | None = None) -> Mesh:
    """The mesh of a config over the first devices it needs (default: of `jax.devices()`).

    Raises: ValueError: More than one axis is -1, or the sizes do not fit the number of devices.
    """
    devices = list(jax.devices() if devices is None else devices)
    sizes = {axis: getattr(config, axis) for axis in AXES}
    shown = ", ".join(f"mesh.{axis}={size}" for axis, size in sizes.items())
    free = [axis for axis, size in sizes.items() if size == -1]
    fixed = int(np.prod([size for size in sizes.values() if size != -1]))
    if len(free) > 1 or any(size < 1 and size != -1 for size in sizes.values()):
        raise ValueError(f"{shown}: sizes are >= 1, and at most one may be -1 (all that are left).")
    if fixed > len(devices) or (free and len(devices) % fixed):
        raise ValueError(
            f"{shown}: needs {'a multiple of ' if free else ''}{fixed} devices, "
            f"and {len(devices)} are visible ({devices[0].platform})."
        )
    for axis in free:
        sizes[axis] = len(devices) // fixed
    shape = tuple(sizes.values())
    grid = np.asarray(devices[: int(np.prod(shape))]).reshape(shape)
    # Auto: the compiler propagates shardings; models do not annotate every array.
    return Mesh(grid, AXES, axis_types=(AxisType.Auto,) * len(AXES))


def check_batch(config: TrainConfig, mesh: Mesh) -> None:
    """Refuses a batch whose parts do not split over the devices."""
    shards = mesh.shape["data"] * mesh.shape["fsdp"]
    part = config.batch // config.accumulate
    if part % shards:
        up, down = -(-part // shards) * shards, part // shards * shards
        fits = " or ".join(str(n * config.accumulate) for n in (down, up) if n)
        raise ValueError(
            f"batch={config.batch} in accumulate={config.accumulate} parts of {part} rows does not "
            f"split over {shards} devices (mesh.data * mesh.fsdp). Batches that fit: {fits}."
        )


def batch_sharding(mesh: Mesh) -> NamedSharding:
    """Rows over `data` and `fsdp`."""
    return NamedSharding(mesh, PartitionSpec(("data", "fsdp")))


def put_batch(windows: np.ndarray, mesh: Mesh) -> jax.Array:
    """This process' rows [batch / processes, length + 1] as one array over the mesh."""
    return jax.make_array_from_process_local_data(batch_sharding(mesh), windows)


def state_shardings(state: Any, mesh: Mesh) -> Any:
    """A sharding for every leaf of a train state; moments lie where their parameter does."""
    return param_shardings(state, mesh)
