"""What the job compiles: every tuned product, and the kernels that have no tiles to tune.

A case is named by what it computes, so that its budget can be looked up. Counts of products are per
64 x 128 weights (SASS; one warp of one warpgroup) and per 1024 x 512 weights (bundles; one step of
the grid), so that tiles of different sizes compare with each other, and with the prototypes that
the kernels were designed after.
"""

import dataclasses
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Final

import jax
import jax.numpy as jnp

import kernels_pallas
from kernels_pallas import Attention, GpuConfig, Rounding, TpuConfig
from kernels_pallas.gpu.layout import chunked, tile
from kernels_pallas.testing import problem

TUNING: Final = Path(kernels_pallas.__file__).parent / "tuning"
KINDS: Final = {
    "nvidia_h200": "NVIDIA H200",
    "tpu_v5_lite": "TPU v5 lite",
    "tpu_v6_lite": "TPU v6 lite",
    "tpu7x": "TPU7x",
}
"""Devices by the names of their tables; the H100's tiles are the H200's."""
_FORMATS: Final = {2: "ternary", 4: "int4", 8: "int8"}


@dataclasses.dataclass(frozen=True)
class Case:
    """One kernel for one kind of device.

    Attributes:
        name: What it computes, and by which path; the key of its budget.
        config: Its tiles, in words.
        units: Counts are divided by this.
        tensor: Whether it has to use the tensor core.
        kernel: How its name begins (TPU).
        function: What is compiled ..
        arguments: .. for arrays like these.
    """

    name: str
    config: str
    units: float
    tensor: bool
    kernel: str
    function: Callable[..., Any]
    arguments: tuple[Any, ...]


def of(device: str) -> list[Case]:
    """All cases of a device, named as in `KINDS`."""
    return [*_products(device), *_roundings(device), *_attentions(device)]


def _products(device: str) -> Iterator[Case]:
    """The entries of the table that differ in what a kernel depends on, and the register path."""
    gpu, seen = device.startswith("nvidia"), set()
    for entry in json.loads((TUNING / f"{device}.json").read_text())["entries"]:
        # A kernel knows the lengths of K and N by its grid alone.
        key = (entry["bits"], entry["act"], entry["m"], tuple(entry["config"].items()))
        if key in seen:
            continue
        seen.add(key)
        group = 128 if entry["bits"] == 4 else entry["k"]
        config: Any = (GpuConfig if gpu else TpuConfig)(**entry["config"])
        yield _product(device, entry["bits"], entry["act"], group, entry, config)
        if gpu and entry["m"] == 8:
            other = dataclasses.replace(config, decode="registers", stages=3)
            yield _product(device, entry["bits"], entry["act"], group, entry, other)
    if gpu:
        # W2A16 has no tuned tiles, but a prototype.
        entry = {"m": 8, "k": 4096, "n": 14336}
        config = GpuConfig(bm=8, chunk=32, stages=3, split_k=1, decode="registers")
        yield _product(device, 2, None, 128, entry, config)
    else:
        # The tile of the prototypes, and the widths that no table has.
        for bits, act, m in (*((4, act, 16) for act in (None, "int8", "fp8")),
                             *((bits, None, m) for bits in (2, 8) for m in (16, 256))):  # fmt: skip
            entry = {"m": m, "k": 4096, "n": 4096}
            config = TpuConfig(bm=m, bk=1024, bn=512)
            yield _product(device, bits, act, 128, entry, config)


def _product(
    device: str, bits: int, act: Any, group: int, entry: dict[str, Any], config: Any
) -> Case:
    gpu = device.startswith("nvidia")
    p = problem(_FORMATS[bits], entry["k"], entry["n"], group, act)
    backend: Any = "mosaic_gpu" if gpu else "mosaic_tpu"

    def prepare(planes: Any) -> Any:
        return (
            chunked(planes, p, config.chunk) if gpu else kernels_pallas.prepare(planes, p, backend)
        )

    def product(x: Any, words: Any, scale: Any) -> Any:
        return kernels_pallas.matmul(x, words, scale, problem=p, backend=backend, config=config)

    planes = tuple(jax.ShapeDtypeStruct(p.plane_shape(width), jnp.int32) for width in p.widths)
    arguments = (
        jax.ShapeDtypeStruct((entry["m"], p.k), p.x_dtype),
        jax.eval_shape(prepare, planes),
        jax.ShapeDtypeStruct((p.groups, p.n), jnp.float32),
    )
    if gpu:
        units, path = tile(p, config.chunk) / 128, f", {config.decode}"
    else:
        units, path = config.bk * config.bn / (1024 * 512), ""
    return Case(
        f"{_FORMATS[bits]} x {act or 'bfloat16'}, m={entry['m']}{path}",
        ", ".join(f"{k}={v}" for k, v in dataclasses.asdict(config).items() if k != "decode"),
        units, True, f"packed_matmul_w{bits}_{act or 'a16'}", product, arguments,
    )  # fmt: skip


def _roundings(device: str) -> Iterator[Case]:
    backend: Any = "mosaic_gpu" if device.startswith("nvidia") else "mosaic_tpu"
    prologues: tuple[Any, ...] = (None, "rms", "hadamard")
    acts: tuple[Any, ...] = ("int8", "fp8")
    for prologue in prologues:
        for act in acts:
            rounding = Rounding(act=act, group=128, prologue=prologue)

            def function(x: Any, weight: Any, rounding: Rounding = rounding) -> Any:
                given = weight if rounding.prologue == "rms" else None
                return kernels_pallas.round_rows(x, rounding, given, backend=backend)

            arguments = (
                jax.ShapeDtypeStruct((16, 4096), jnp.bfloat16),
                jax.ShapeDtypeStruct((4096,), jnp.float32),
            )
            name = f"rows to {act}" + (f" behind {prologue}" if prologue else "")
            config = "16 x 4096, groups of 128"
            yield Case(
                name, config, 1, prologue == "hadamard", f"round_rows_{act}", function, arguments
            )


def _attentions(device: str) -> Iterator[Case]:
    backend: Any = "mosaic_gpu" if device.startswith("nvidia") else "mosaic_tpu"
    formats: tuple[Any, ...] = ("int8", "fp8", "int4")
    for fmt in formats:
        attention = Attention(fmt=fmt, kv_heads=8, heads=32, head_dim=128, scale=128**-0.5)

        def function(query: Any, *rest: Any, attention: Attention = attention) -> Any:
            key, key_scale, value, value_scale, stop = rest
            return kernels_pallas.attend(
                query, (key, key_scale), (value, value_scale), 0, stop,
                attention=attention, backend=backend,
            )  # fmt: skip

        words = jax.ShapeDtypeStruct((1, 4096, 8, attention.words), jnp.int32)
        scale = jax.ShapeDtypeStruct((1, 4096, 8), jnp.float16)
        arguments = (
            jax.ShapeDtypeStruct((1, 32, 128), jnp.bfloat16), words, scale, words, scale,
            jax.ShapeDtypeStruct((), jnp.int32),
        )  # fmt: skip
        name, config = f"attention over {fmt}", "32 heads, 8 key heads of 128"
        yield Case(name, config, 1, True, f"attend_{fmt}", function, arguments)
