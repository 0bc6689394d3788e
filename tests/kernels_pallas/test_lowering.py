"""Every tuned configuration, and each kind of decoding, is lowered for its device without one."""

import json
from pathlib import Path

import jax
import jax.numpy as jnp
import pytest

import kernels_pallas
from kernels_pallas import GpuConfig, TpuConfig
from kernels_pallas.config import look_up, tuned
from kernels_pallas.gpu.layout import chunked
from kernels_pallas.testing import described, problem

TUNING = Path(kernels_pallas.__file__).parent / "tuning"
DEVICES = {path.stem: json.loads(path.read_text())["entries"] for path in TUNING.glob("*.json")}
FORMATS = {4: "int4", 2: "ternary"}


def unique_entries():
    """One of the entries that differ in nothing a lowering could depend on."""
    found = {}
    for device, entries in sorted(DEVICES.items()):
        for entry in entries:
            platform = "gpu" if device.startswith("nvidia") else "tpu"
            config = tuple(entry["config"].items())
            found.setdefault((platform, entry["bits"], entry["act"], config), (device, entry))
    return list(found.values())


def lowered(p, backend, config, m, kind):
    """The module for a device of this kind, of shapes alone."""
    platform = "gpu" if backend == "mosaic_gpu" else "tpu"
    planes = tuple(jax.ShapeDtypeStruct(p.plane_shape(width), jnp.int32) for width in p.widths)

    def prepare(planes):
        if backend == "mosaic_tpu":
            return kernels_pallas.prepare(planes, p, backend)
        return chunked(planes, p, config.chunk)

    def product(*operands):
        return kernels_pallas.matmul(*operands, problem=p, backend=backend, config=config)

    per_group = jax.ShapeDtypeStruct((p.groups, p.n), jnp.float32)
    arguments = (
        jax.ShapeDtypeStruct((m, p.k), p.x_dtype),
        jax.eval_shape(prepare, planes),
        per_group,
        jax.ShapeDtypeStruct(per_group.shape, jnp.uint8) if p.zero_points else None,
    )
    with described(kind, platform, 132 if platform == "gpu" else 1):
        name = "cuda" if platform == "gpu" else "tpu"
        return jax.jit(product).trace(*arguments).lower(lowering_platforms=(name,)).as_text()


@pytest.mark.parametrize(
    ("device", "entry"),
    unique_entries(),
    ids=lambda value: value if isinstance(value, str) else f"w{value['bits']}-{value['act']}",
)
def test_every_tuned_configuration_is_lowered(device, entry):
    gpu = device.startswith("nvidia")
    config = (GpuConfig if gpu else TpuConfig)(**entry["config"])
    group = 128 if entry["bits"] == 4 else entry["k"]
    p = problem(FORMATS[entry["bits"]], entry["k"], entry["n"], group, entry["act"])
    text = lowered(p, "mosaic_gpu" if gpu else "mosaic_tpu", config, entry["m"], device)
    assert ("mosaic_gpu" if gpu else "tpu_custom_call") in text


@pytest.mark.parametrize(
    ("fmt", "act", "chunk"),
    [("int4", None, 32), ("uint4", "int8", 32), ("int4", "int8", 16)],
)
def test_weights_in_registers_are_lowered(fmt, act, chunk):
    p = problem(fmt, 1024, 128, 128, act)
    config = GpuConfig(bm=8, chunk=chunk, stages=1, split_k=1, decode="registers")
    assert "mosaic_gpu" in lowered(p, "mosaic_gpu", config, 8, "NVIDIA H200")


@pytest.mark.parametrize(
    ("fmt", "backend", "kind"),
    [
        ("fp4", "mosaic_gpu", "NVIDIA H200"),
        ("nf4", "mosaic_tpu", "TPU v5 lite"),
        ("fp4", "mosaic_tpu", "TPU v6 lite"),
        ("int3", "mosaic_tpu", "TPU v6 lite"),
    ],
)
def test_tables_and_planes_are_lowered(fmt, backend, kind):
    p = problem(fmt, 1024, 128, 32)
    config = GpuConfig(bm=8, chunk=32, stages=1, split_k=1)
    config = config if backend == "mosaic_gpu" else None
    assert lowered(p, backend, config, 8, kind)


def test_an_entry_serves_fewer_rows_than_it_was_tuned_for_and_no_other_shape():
    entries = tuned("TPU v6 lite")
    assert entries
    assert all(entry["source"] in ("measured", "compiled", "heuristic") for entry in entries)
    p = problem("int4", 4096, 4096, 128)
    assert look_up("TPU v6 lite", p, 1) == look_up("TPU v6 lite", p, 16)
    assert look_up("TPU v6 lite", p, 17) == look_up("TPU v6 lite", p, 256)
    assert look_up("TPU v6 lite", p, 257) is None
    assert look_up("TPU v6 lite", problem("int4", 4096, 4224, 128), 1) is None
    assert look_up("a device of tomorrow", p, 1) is None
