"""Two processes that hold a model together save it and load it: each its part, one manifest."""

import os
import socket
import subprocess
import sys

import pytest

import lowbit_jax as lb

PROGRAM = """
import sys
import jax
address, process, template, path = sys.argv[1:]
jax.distributed.initialize(address, num_processes=2, process_id=int(process))
import lowbit_jax as lb
from flax import nnx
mesh = jax.make_mesh((2, 2), ("fsdp", "tensor"), axis_types=(jax.sharding.AxisType.Auto,) * 2)
model = lb.checkpoint.load(template, mesh=mesh, verify=True)
arrays = jax.tree.leaves(nnx.state(model))
assert any(not x.is_fully_addressable and not x.is_fully_replicated for x in arrays)
for turn in range(2):
    lb.checkpoint.save(path, model, overwrite=turn > 0)
again = lb.checkpoint.load(path, mesh=mesh, verify=True)
print(lb.checkpoint.digest(again))
"""


@pytest.mark.slow
def test_two_processes_save_and_load_together(saved, packed, tmp_path):
    with socket.socket() as probe:
        probe.bind(("localhost", 0))
        address = f"localhost:{probe.getsockname()[1]}"
    flags = {"JAX_PLATFORMS": "cpu", "XLA_FLAGS": "--xla_force_host_platform_device_count=2"}
    runs = [
        subprocess.Popen(
            [sys.executable, "-c", PROGRAM, address, str(i), str(saved), str(tmp_path / "c")],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env=os.environ | flags,
        )
        for i in range(2)
    ]
    try:
        outputs = [run.communicate(timeout=300) for run in runs]
    finally:
        for run in runs:
            run.kill()
    assert [run.returncode for run in runs] == [0, 0], "\n".join(err[-2000:] for _, err in outputs)
    expected = lb.checkpoint.digest(packed)
    assert [out.split()[-1] for out, _ in outputs] == [expected] * 2
    assert lb.checkpoint.digest(lb.checkpoint.load(tmp_path / "c", verify=True)) == expected
    assert sorted(p.name for p in (tmp_path / "c").iterdir()) == ["arrays-1", "manifest.json"]
