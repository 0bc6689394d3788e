"""Small files of other programs, written here as their formats say, and a random decoder."""

import json
import struct
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import jax
import ml_dtypes
import numpy as np
import pytest
from flax import nnx

from lowbit_jax.models import Decoder, DecoderConfig

# GGUF's numbers of the types of values and tensors.
VALUES = {
    np.uint8: 0,
    np.int8: 1,
    np.uint16: 2,
    np.int16: 3,
    np.uint32: 4,
    np.int32: 5,
    np.float32: 6,
    np.uint64: 10,
    np.int64: 11,
    np.float64: 12,
}
TENSORS = {"F32": 0, "F16": 1, "Q4_0": 2, "Q8_0": 8, "Q4_K": 12, "BF16": 30}
SAFE = {np.float32: "F32", np.float16: "F16", ml_dtypes.bfloat16: "BF16"}


def gguf_string(text: str) -> bytes:
    return struct.pack("<Q", len(text.encode())) + text.encode()


def gguf_value(value: Any) -> bytes:
    """Type and content. An int is uint32, a float float32; a numpy scalar keeps its type."""
    match value:
        case np.generic():  # before float: np.float64 is one
            return struct.pack("<I", VALUES[type(value)]) + value.tobytes()
        case bool():
            return struct.pack("<IB", 7, value)
        case str():
            return struct.pack("<I", 8) + gguf_string(value)
        case int():
            return gguf_value(np.uint32(value))
        case float():
            return gguf_value(np.float32(value))
        case list():
            # An array states its elements' type once.
            parts = [gguf_value(item) for item in value]
            kind = parts[0][:4] if parts else struct.pack("<I", 8)
            return (
                struct.pack("<I", 9)
                + kind
                + struct.pack("<Q", len(parts))
                + b"".join(part[4:] for part in parts)
            )
        case np.ndarray():
            kind = struct.pack("<IIQ", 9, VALUES[value.dtype.type], value.size)
            return kind + value.tobytes()
    raise TypeError(type(value))


def gguf_pair(key: str, value: Any) -> bytes:
    return gguf_string(key) + gguf_value(value)


def gguf_bytes(
    metadata: Mapping[str, Any],
    tensors: Mapping[str, tuple[str, tuple[int, ...], bytes]],
    *,
    version: int = 3,
    alignment: int = 32,
) -> bytes:
    """A GGUF file; tensors are (type, shape as in numpy, data)."""
    head = b"GGUF" + struct.pack("<IQQ", version, len(tensors), len(metadata))
    head += b"".join(gguf_pair(key, value) for key, value in metadata.items())
    data = b""
    for name, (kind, shape, content) in tensors.items():
        head += gguf_string(name) + struct.pack("<I", len(shape))
        head += struct.pack(f"<{len(shape)}Q", *shape[::-1])
        head += struct.pack("<IQ", TENSORS[kind], len(data))
        data += content + b"\0" * (-len(content) % alignment)
    return head + b"\0" * (-len(head) % alignment) + data


def safetensors_bytes(tensors: Mapping[str, np.ndarray]) -> bytes:
    header, data = {}, b""
    for name, tensor in tensors.items():
        offsets = [len(data), len(data) + tensor.nbytes]
        header[name] = {
            "dtype": SAFE[tensor.dtype.type],
            "shape": list(tensor.shape),
            "data_offsets": offsets,
        }
        data += tensor.tobytes()
    text = json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + data


def random_leaves(config: DecoderConfig) -> dict[str, np.ndarray]:
    """Parameters of a decoder by path, random, also where training starts from 1 or 0."""
    state = nnx.state(nnx.eval_shape(lambda: Decoder(config, rngs=nnx.Rngs(0))))
    rng = np.random.default_rng(0)

    def draw(path: tuple[Any, ...], shape: tuple[int, ...]) -> np.ndarray:
        near, spread = (1.0, 0.3) if path[-1] == "scale" else (0.0, shape[0] ** -0.5)
        return np.float32(near + spread * rng.normal(size=shape))

    return {"/".join(map(str, p)): draw(p, v.shape) for p, v in nnx.to_flat_state(state)}


def leaves_of(model: nnx.Module) -> dict[str, np.ndarray]:
    return {
        "/".join(map(str, path)): np.asarray(jax.device_get(variable[...]))
        for path, variable in nnx.to_flat_state(nnx.state(model))
    }


class Files:
    """The writers above, as one fixture."""

    gguf = staticmethod(gguf_bytes)
    gguf_string = staticmethod(gguf_string)
    gguf_pair = staticmethod(gguf_pair)
    safetensors = staticmethod(safetensors_bytes)
    random_leaves = staticmethod(random_leaves)
    leaves_of = staticmethod(leaves_of)


@pytest.fixture(scope="session")
def files() -> type[Files]:
    return Files


@pytest.fixture
def save(tmp_path) -> Callable[[bytes, str], Path]:
    def save(content: bytes, name: str = "model.gguf") -> Path:
        (tmp_path / name).write_bytes(content)
        return tmp_path / name

    return save
