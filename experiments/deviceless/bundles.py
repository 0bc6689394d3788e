"""Bundles of a Mosaic TPU kernel, compiled by libtpu without a TPU.

A bundle is what one TensorCore issues in one cycle, so that the number of them in a kernel without
loops is close to the cycles of one step of its grid, where memory does not hold it up.
"""

import os
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any, Final

TOPOLOGIES: Final = {
    "TPU v5 lite": "v5e:2x2",
    "TPU v6 lite": "v6e:2x2",
    "TPU7x": "tpu7x:2x2x1",
}
_TOTAL: Final = re.compile(r"total scheduled bundles:\s+(\d+)")


def environment(folder: Path) -> dict[str, str]:
    """What a process that compiles has to find in its environment before it imports jax."""
    return os.environ | {
        "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",  # another compiler may run beside this one
        "JAX_PLATFORMS": "cpu",
        "LIBTPU_INIT_ARGS": f"--xla_jf_dump_to={folder} --xla_jf_dump_llo_text=true",
        "TPU_ACCELERATOR_TYPE": "v5litepod-4",
        "TPU_SKIP_MDS_QUERY": "1",
        "TPU_WORKER_HOSTNAMES": "localhost",
    }


def compiled(
    function: Callable[..., Any], arguments: Any, kind: str, kernel: str, folder: Path
) -> int:
    """Compiles for a kind of TPU and counts the bundles of the kernel that `kernel` begins.

    Raises:
        ValueError: libtpu left no count of such a kernel.
    """
    import jax
    from jax.experimental import topologies

    topology = topologies.get_topology_desc(platform="tpu", topology_name=TOPOLOGIES[kind])
    place = jax.sharding.SingleDeviceSharding(topology.devices[0])
    device = jax.sharding.AbstractDevice(device_kind=kind, platform="tpu", num_cores=1)
    arguments = jax.tree.map(
        lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=place), arguments
    )
    for old in folder.iterdir():
        old.unlink()
    with jax.sharding.use_abstract_mesh(jax.sharding.AbstractMesh((), (), abstract_device=device)):
        jax.jit(function).trace(*arguments).lower(lowering_platforms=("tpu",)).compile()
    reports = list(folder.glob(f"*-{kernel}*schedule-analysis_final_bundles.txt"))
    counts = [_TOTAL.search(report.read_text()) for report in reports]
    found = [int(count.group(1)) for count in counts if count is not None]
    if len(found) != 1:
        raise ValueError(f"{len(found)} counts of a kernel named {kernel}* in {folder}.")
    return found[0]
