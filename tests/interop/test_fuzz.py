"""Damaged files of quantized models: a clear error or a model, and nothing else."""

import contextlib
import json
import tracemalloc

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lowbit_jax import formats
from lowbit_jax.interop.codecs import (
    awq,
    bitnet,
    bitsandbytes,
    block_floats,
    compressed_tensors,
    gptq,
)
from lowbit_jax.interop.codecs.ggml_blocks import BLOCK_TYPES, encode
from lowbit_jax.interop.codecs.parts import Kernel, make_qtensor
from lowbit_jax.interop.gguf import GGUFFile
from lowbit_jax.interop.gguf_models import _Source
from lowbit_jax.interop.huggingface import read_config
from lowbit_jax.interop.methods import open_tensors
from lowbit_jax.interop.quantized import QuantizedTensors
from lowbit_jax.interop.writers import GGUFOutput, write_gguf, write_safetensors
from lowbit_jax.scale_formats import E4M3, FLOAT16
from lowbit_jax.spec import PerGroup, PerTensor, QuantSpec

K, N, LAYERS = 64, 32, 4


def kernel(format, granularity, scale_format=FLOAT16):
    spec = QuantSpec(
        format=format,
        granularity=granularity,
        symmetric=format.name != "uint4",
        scale_format=scale_format,
    )
    rng = np.random.default_rng(0)
    codes = rng.integers(0, 3, (K, N), dtype=np.uint8)
    shape = spec.scale_shape((K, N))
    zeros = None if spec.symmetric else np.full(shape, 3, np.uint8)
    glob = np.float32([[0.5]]) if spec.has_global_scale else None
    scale = np.ones(shape, scale_format.dtype)
    return Kernel(
        make_qtensor(codes, spec, scale, zero_point=zeros, global_scale=glob, where="made")
    )


def ct_config(format, bits, kind="int"):
    group = {"targets": ["re:.*layer.*"], "weights": {"num_bits": bits, "type": kind}}
    return {
        "quant_method": "compressed-tensors",
        "format": format,
        "config_groups": {"group_0": group},
    }


def nf4_parts():
    state = {"quant_type": "nf4", "blocksize": 64, "shape": [N, K]}
    return {
        "weight": np.zeros((N * K // 2, 1), np.uint8),
        "weight.absmax": np.ones(N * K // 64, np.float32),
        bitsandbytes.STATE: np.frombuffer(json.dumps(state).encode(), np.uint8),
    }


UINT4 = kernel(formats.UINT4, PerGroup(32))
E2M1 = kernel(formats.FP4_E2M1, PerGroup(16), E4M3)
PACKED, NVFP4 = compressed_tensors.PACKED, block_floats.NVFP4
CASES = {
    "gptq": (
        {"quant_method": "gptq", "bits": 4, "sym": False},
        gptq.encode(UINT4, version=1, where="w"),
    ),
    "awq": ({"quant_method": "awq", "bits": 4}, awq.encode(UINT4, where="w")),
    "packed": (ct_config(PACKED, 4), compressed_tensors.encode(UINT4, format=PACKED, where="w")),
    "nvfp4": (ct_config(NVFP4, 4, "float"), block_floats.encode(E2M1, format=NVFP4, where="w")),
    "bitnet": (
        {"quant_method": "bitnet"},
        bitnet.encode(kernel(formats.TERNARY, PerTensor()), linear="bitlinear", where="w"),
    ),
    "nf4": (
        {"quant_method": "bitsandbytes", "load_in_4bit": True, "bnb_4bit_quant_type": "nf4"},
        nf4_parts(),
    ),
}


class Folders(dict):
    """By name; hypothesis prints a test's arguments, and these are long."""

    def __repr__(self):
        return "folders"


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """A sound folder of every method, and its two files' bytes."""
    made = Folders()
    for name, (config, parts) in CASES.items():
        folder = tmp_path_factory.mktemp(name)
        tensors = [
            (f"layer{i}.{part}", tensor) for i in range(LAYERS) for part, tensor in parts.items()
        ]
        write_safetensors(folder / "model.safetensors", tensors)
        (folder / "config.json").write_text(json.dumps({"quantization_config": config}))
        files = ("model.safetensors", "config.json")
        made[name] = folder, {file: (folder / file).read_bytes() for file in files}
    return made


def read(folder):
    tensors = open_tensors(folder, read_config(folder))
    if not isinstance(tensors, QuantizedTensors):  # the name of the key itself was damaged
        return 0
    for name in tensors.quantized:
        assert tensors.kernel(name).qtensor.shape[::-1] == tensors.shapes[name]
    return len(tensors.quantized)


@pytest.mark.parametrize("name", CASES)
def test_sound_folders_are_read(folders, name):
    folder, files = folders[name]
    for file, content in files.items():
        (folder / file).write_bytes(content)
    assert read(folder) == LAYERS


def damaged(rng, content):
    """Some bytes changed, cut out, doubled, or swapped for others of the file."""
    changed = bytearray(content)
    for _ in range(rng.integers(1, 5)):
        at, other = rng.integers(0, len(changed), 2)
        match rng.integers(0, 4):
            case 0:
                changed[at] = rng.integers(0, 256)
            case 1:
                del changed[at : min(at + rng.integers(1, 40), len(changed) - 1)]
            case 2:
                changed[at:at] = changed[at : at + 8]
            case 3:
                changed[at], changed[other] = changed[other], changed[at]
    return bytes(changed)


@contextlib.contextmanager
def refused_or_read(begin=""):
    """Passes the two errors that a reader may raise, if they say something."""
    try:
        yield
    except (ValueError, NotImplementedError) as error:
        if not str(error) or not str(error).startswith(begin):
            raise AssertionError("an error without words") from error


@pytest.mark.filterwarnings("ignore:.*labelled as GPTQ version")
@settings(max_examples=60)
@given(seed=st.integers(0, 2**32 - 1))
@pytest.mark.parametrize("name", CASES)
def test_a_damaged_folder_is_refused_or_read(folders, name, seed):
    (folder, files), rng = folders[name], np.random.default_rng(seed)
    broken = rng.choice(list(files))
    size = sum(map(len, files.values()))
    for file, content in files.items():
        # The header, where the lies are, is a small part of the weights' bytes.
        head = len(content) if rng.integers(0, 2) else 1500
        if file == broken:
            content = damaged(rng, content[:head]) + content[head:]
        (folder / file).write_bytes(content)
    tracemalloc.start()
    with refused_or_read():
        read(folder)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 2 * size + 2**20  # a mebibyte for the reader itself


@settings(max_examples=30)
@given(seed=st.integers(0, 2**32 - 1))
@pytest.mark.parametrize("type", BLOCK_TYPES)
def test_a_damaged_gguf_file_is_refused_or_read(type, tmp_path_factory, seed):
    kind, shape = BLOCK_TYPES[type], (4, 512)
    q = make_qtensor(
        np.ones(shape[::-1], np.uint8),
        kind.spec,
        np.ones(kind.spec.scale_shape(shape[::-1]), kind.scale_format.dtype),
        where="made",
    )
    path = tmp_path_factory.getbasetemp() / "quantized.gguf"
    block = encode(Kernel(q), type, where="t")
    write_gguf(path, {"a": 1}, [GGUFOutput("t", type, shape, lambda: block)])
    path.write_bytes(damaged(np.random.default_rng(seed), path.read_bytes()))
    with refused_or_read():
        source = _Source(GGUFFile(path))
        for name in source.quantized:
            assert source.kernel(name).qtensor.shape[::-1] == source.shapes[name]


@settings(max_examples=120)
@given(data=st.data())
@pytest.mark.parametrize("name", CASES)
def test_parts_of_any_type_and_shape_are_refused_or_read(name, data):
    """As a sound header could describe them."""
    _, parts = CASES[name]
    parts = dict(parts)
    for _ in range(data.draw(st.integers(1, 2))):
        part = data.draw(st.sampled_from(sorted(parts)))
        dtype = data.draw(st.sampled_from([np.int32, np.uint8, np.float16, np.float32, np.int64]))
        shape = data.draw(st.lists(st.sampled_from([0, 1, 2, 4, 32, 64]), max_size=3))
        parts[part] = np.full(shape, data.draw(st.sampled_from([0, 1, 3, 120])), dtype)
    decoders = {
        "gptq": lambda: gptq.decode(parts, bits=4, version=2, symmetric=False, where="w"),
        "awq": lambda: awq.decode(parts, where="w"),
        "packed": lambda: compressed_tensors.decode(parts, format=PACKED, bits=4, where="w"),
        "nvfp4": lambda: block_floats.decode(parts, format=NVFP4, where="w"),
        "bitnet": lambda: bitnet.decode(parts, linear="bitlinear", where="w"),
        "nf4": lambda: bitsandbytes.decode(parts, where="w"),
    }
    with refused_or_read("w"):
        decoders[name]()


def test_a_pattern_that_could_run_for_ever_is_refused(folders):
    folder, files = folders["packed"]
    config = json.loads(files["config.json"])
    config["quantization_config"]["config_groups"]["group_0"]["targets"] = ["re:(a+)+$"]
    (folder / "model.safetensors").write_bytes(files["model.safetensors"])
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(NotImplementedError, match="repeats a group"):
        read(folder)
