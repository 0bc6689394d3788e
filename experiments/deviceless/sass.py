"""Hopper machine code of a Mosaic GPU kernel, compiled without a GPU, and its inner loop counted.

XLA compiles for a device that is described instead of present, Mosaic calls `ptxas` and `nvdisasm`
of NVIDIA's wheels, and `MOSAIC_GPU_DUMP_TO` keeps what they say: registers, spills and SASS. The
inner loop is the shortest backward branch around the first instruction of the tensor core, or,
where a kernel has none, the longest backward branch there is.
"""

import dataclasses
import os
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any, Final

CORES: Final = 132
_INSTRUCTION: Final = re.compile(r"/\*([0-9a-f]{4,6})\*/\s+(?:@!?U?P\w+\s+)?([A-Z]\w*)(\S*)\s*(.*)")
_LABEL: Final = re.compile(r"(\.L_x_\d+):")
_SPILLS: Final = re.compile(r"(\d+) bytes spill stores, (\d+) bytes spill loads")
_REGISTERS: Final = re.compile(r"Used (\d+) registers")
_TENSOR: Final = ("HGMMA", "IGMMA", "QGMMA")
# The H200 as XLA describes it.
_SPEC: Final = """gpu_device_info {
  threads_per_block_limit: 1024 threads_per_warp: 32 shared_memory_per_block: 49152
  shared_memory_per_core: 233472 threads_per_core_limit: 2048 core_count: 132 fpus_per_core: 128
  block_dim_limit_x: 2147483647 block_dim_limit_y: 65535 block_dim_limit_z: 65535
  memory_bandwidth: 4800000000000 l2_cache_size: 62914560 clock_rate_ghz: 1.98
  device_memory_size: 150000000000 shared_memory_per_block_optin: 232448
  cuda_compute_capability { major: 9 } registers_per_core_limit: 65536
  registers_per_block_limit: 65536
}
platform_name: "CUDA"
dnn_version_info { major: 9 minor: 12 patch: 0 }
device_description_str: "NVIDIA H200"
"""


@dataclasses.dataclass(frozen=True)
class Code:
    """What the compilers said of one kernel.

    Attributes:
        spills: Bytes stored to or loaded from local memory for want of registers.
        registers: Of a thread.
        tensor: Instructions of the tensor core in the whole kernel.
        loop: Instructions of the inner loop; of the whole kernel where it has no loop.
    """

    spills: int
    registers: int
    tensor: int
    loop: int


def environment(folder: Path) -> dict[str, str]:
    """What a process that compiles has to find in its environment before it imports jax.

    Raises:
        ModuleNotFoundError: NVIDIA's compiler is not installed.
    """
    import nvidia

    tools = [Path(path) / "cu13" / "bin" for path in nvidia.__path__]
    flags = os.environ.get("XLA_FLAGS", "") + " --xla_gpu_autotune_level=0"
    return os.environ | {
        "JAX_PLATFORMS": "cpu",
        "JAX_SKIP_CUDA_CONSTRAINTS_CHECK": "1",
        "MOSAIC_GPU_DUMP_TO": str(folder),
        "PATH": os.pathsep.join([*map(str, tools), os.environ.get("PATH", "")]),
        "XLA_FLAGS": flags.strip(),
    }


def compiled(function: Callable[..., Any], arguments: Any, folder: Path) -> list[Code]:
    """Compiles for the H200 and reads what was left in the folder: one entry a kernel."""
    import jax
    from jax.experimental import topologies

    topology = topologies.get_topology_desc(
        platform="cuda", topology_name="h200", topology="1x1x1", target_config=_SPEC
    )
    place = jax.sharding.SingleDeviceSharding(topology.devices[0])
    device = jax.sharding.AbstractDevice(device_kind="NVIDIA H200", platform="gpu", num_cores=CORES)
    arguments = jax.tree.map(
        lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=place), arguments
    )
    before = set(folder.glob("*.ptxas"))
    with jax.sharding.use_abstract_mesh(jax.sharding.AbstractMesh((), (), abstract_device=device)):
        jax.jit(function).trace(*arguments).lower(lowering_platforms=("cuda",)).compile()
    reports = sorted(set(folder.glob("*.ptxas")) - before)
    return [read(report.read_text(), report.with_suffix(".sass_ctrl").read_text())
            for report in reports]  # fmt: skip


def read(ptxas: str, sass: str) -> Code:
    """The report of ptxas and the disassembly of one kernel.

    Raises:
        ValueError: The report names no spills or registers: another version's format.
    """
    spills, registers = _SPILLS.search(ptxas), _REGISTERS.search(ptxas)
    if spills is None or registers is None:
        raise ValueError(f"ptxas' report has no spills or registers in it: {ptxas[:300]!r}")
    names, targets, labels = _listing(sass)
    tensor = [at for at, name in enumerate(names) if name in _TENSOR]
    loops = [
        (labels[target], at)
        for at, target in targets.items()
        if target in labels and labels[target] <= at
    ]
    if tensor:
        around = [at - start + 1 for start, at in loops if start <= tensor[0] <= at]
        loop = min(around, default=len(names))
    else:
        loop = max((at - start + 1 for start, at in loops), default=len(names))
    return Code(sum(map(int, spills.groups())), int(registers.group(1)), len(tensor), loop)


def _listing(sass: str) -> tuple[list[str], dict[int, str], dict[str, int]]:
    """Names of the instructions, branches by their place, and labels by what follows them."""
    names: list[str] = []
    targets: dict[int, str] = {}
    labels: dict[str, int] = {}
    for line in sass.splitlines():
        if label := _LABEL.match(line):
            labels[label.group(1)] = len(names)
        elif found := _INSTRUCTION.search(line):
            to = re.search(r"\.L_x_\d+", found.group(4)) if found.group(2) == "BRA" else None
            # The one that a kernel ends with jumps to itself.
            if to is not None and labels.get(to.group()) != len(names):
                targets[len(names)] = to.group()
            names.append(found.group(2))
    return names, targets, labels
