"""Sound files of every format that is read here, and their readers."""

import collections
import dataclasses
import io
import json
import pickle
import struct
import sys
import types
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Final

import numpy as np
import tokenizers
from flax import nnx

import lowbit_jax as lb
from lowbit_jax.data import SubwordTokenizer
from lowbit_jax.interop import export_model, load_model
from lowbit_jax.interop.safetensors_files import SafeTensors
from lowbit_jax.interop.torch_pickle import LEGACY, read_tensors
from lowbit_jax.interop.writers import write_safetensors
from lowbit_jax.models import Decoder, DecoderConfig

CONFIG: Final = DecoderConfig(
    vocab=12, dim=32, layers=1, heads=2, kv_heads=1, ffn_dim=32, max_length=8
)
LINEAR: Final = r"layers/\d+/(attention|mlp)/\w+"


@dataclasses.dataclass(frozen=True)
class Reader:
    """make: Writes sound files or folders below a folder, and names them.
    read: Of one of them.
    """

    make: Callable[[Path], Iterator[Path]]
    read: Callable[[Path], Any]


def decoder(**changes: Any) -> Decoder:
    """A decoder with random weights."""
    return Decoder(dataclasses.replace(CONFIG, **changes), rngs=nnx.Rngs(0))


def packed(scheme: str, **changes: Any) -> nnx.Module:
    """The same, quantized and packed; scales are float16, as most formats store them."""
    recipe = lb.Recipe(lb.Rule(LINEAR, scheme))
    return lb.pack_model(lb.quantize_model(decoder(**changes), recipe))


def tokenizer() -> SubwordTokenizer:
    """Of the decoder's vocabulary."""
    names = {"a": 0, "b": 1, "ab": 2, "<s>": 3, "</s>": 4}
    engine = tokenizers.Tokenizer(tokenizers.models.BPE(names, [("a", "b")]))
    engine.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    engine.decoder = tokenizers.decoders.ByteLevel()
    engine.add_special_tokens(["<s>", "</s>"])
    return SubwordTokenizer(engine.to_str(), bos=None, eos=4)


def _dense(place: Path) -> Iterator[Path]:
    """One file, and shards with an index."""
    export_model(decoder(), place / "one", "safetensors", tokenizer=tokenizer())
    yield place / "one"
    whole, shards = SafeTensors(place / "one"), place / "shards"
    shards.mkdir()
    halves: list[list[str]] = [list(whole.tensors)[::2], list(whole.tensors)[1::2]]
    places = {}
    for i, names in enumerate(halves):
        file = f"model-{i}.safetensors"
        write_safetensors(shards / file, [(name, whole.read(name)) for name in names])
        places |= dict.fromkeys(names, file)
    (shards / "model.safetensors.index.json").write_text(json.dumps({"weight_map": places}))
    (shards / "config.json").write_bytes((place / "one" / "config.json").read_bytes())
    yield shards


def _huggingface(place: Path) -> Iterator[Path]:
    """Families, whose configurations differ."""
    families: dict[str, dict[str, Any]] = {
        "llama": {"rope_factors": (2.0,) * 8},
        "qwen2": {"qkv_bias": True},
        "qwen3": {"qk_norm": True},
        "mistral": {"windows": (4,)},
    }
    for name, changes in families.items():
        export_model(decoder(**changes), place / name, "safetensors", tokenizer=tokenizer())
        yield place / name


def _gguf(place: Path) -> Iterator[Path]:
    export_model(decoder(), place / "f16.gguf", "gguf", tokenizer=tokenizer())
    yield place / "f16.gguf"
    export_model(decoder(), place / "q8.gguf", "gguf-q8_0")
    yield place / "q8.gguf"
    export_model(packed("w4a16_g32"), place / "q4.gguf", "gguf")
    yield place / "q4.gguf"
    export_model(packed("mxfp4a16"), place / "mx.gguf", "gguf")
    yield place / "mx.gguf"
    wide = packed("w1_58a16", dim=256, ffn_dim=256, heads=1)
    for kind in ("tq1_0", "tq2_0"):
        export_model(wide, place / f"{kind}.gguf", f"gguf-{kind}")
        yield place / f"{kind}.gguf"


def _folders(format: str, *schemes: str) -> Callable[[Path], Iterator[Path]]:
    def make(place: Path) -> Iterator[Path]:
        for scheme in schemes:
            export_model(packed(scheme), place / scheme, format)
            yield place / scheme

    return make


def _checkpoints(place: Path) -> Iterator[Path]:
    models = {
        "float": decoder(),
        "train": lb.quantize_model(decoder(), "w4a16_g32_lsq"),
        "packed": packed("w4a16_g32"),
        "three": packed("w3a16"),
        "nvfp4": packed("nvfp4a16"),
    }
    for name, model in models.items():
        lb.checkpoint.save(place / name, model, tokenizer=tokenizer().to_json())
        yield place / name


def _bitsandbytes(place: Path) -> Iterator[Path]:
    """Made by hand, since it is read only: NF4 with its scales quantized once more."""
    export_model(decoder(dim=64, ffn_dim=64), place / "dense", "safetensors")
    whole, folder = SafeTensors(place / "dense"), place / "nf4"
    folder.mkdir()
    tensors: list[tuple[str, np.ndarray]] = []
    rng = np.random.default_rng(0)
    for name in whole.tensors:
        value = whole.read(name)
        if "_proj" not in name:
            tensors.append((name, value))
            continue
        blocks = value.size // 64
        state = {
            "quant_type": "nf4", "blocksize": 64, "dtype": "float16", "shape": list(value.shape),
            "nested_blocksize": 256, "nested_dtype": "float32", "nested_offset": 0.5,
        }  # fmt: skip
        tensors += [
            (name, rng.integers(0, 256, (value.size // 2, 1), np.uint8)),
            (f"{name}.absmax", rng.integers(0, 256, blocks, np.uint8)),
            (f"{name}.nested_absmax", np.ones(-(-blocks // 256), np.float32)),
            (f"{name}.nested_quant_map", np.linspace(-1, 1, 256, dtype=np.float32)),
            (f"{name}.quant_map", np.array(lb.formats.get("nf4").values, np.float32)),
            (
                f"{name}.quant_state.bitsandbytes__nf4",
                np.frombuffer(json.dumps(state).encode(), np.uint8),
            ),
        ]
    write_safetensors(folder / "model.safetensors", tensors)
    config = json.loads((place / "dense" / "config.json").read_text())
    config["quantization_config"] = {
        "quant_method": "bitsandbytes", "load_in_4bit": True, "bnb_4bit_quant_type": "nf4",
        "bnb_4bit_use_double_quant": True,
    }  # fmt: skip
    (folder / "config.json").write_text(json.dumps(config))
    yield folder


class _Storage:
    def __init__(self, key: str, kind: str, length: int):
        self.key, self.kind, self.length = key, kind, length


class _Tensor:
    """What torch pickles a tensor as."""

    def __init__(self, key: str, array: np.ndarray):
        self.key, self.array = key, array

    def __reduce__(self) -> Any:
        kind = {"f4": "FloatStorage", "i8": "LongStorage"}[self.array.dtype.str[1:]]
        storage = _Storage(self.key, kind, self.array.size)
        strides = tuple(s // self.array.itemsize for s in self.array.strides)
        rest = (False, collections.OrderedDict())
        args = (storage, 0, self.array.shape, strides, *rest)
        return sys.modules["torch._utils"].rebuild, args  # type: ignore[attr-defined]


def _torch(place: Path) -> Iterator[Path]:
    """A zip and the older form; nothing of torch is needed, only its names."""
    arrays = {
        "conv1.weight": np.arange(12, dtype=np.float32).reshape(2, 6),
        "linear.weight": np.ones((3, 2), np.float32),
        "bn1.num_batches_tracked": np.array(7, np.int64),
    }
    content = collections.OrderedDict((name, _Tensor(name, a)) for name, a in arrays.items())
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w") as archive:
        archive.writestr("archive/data.pkl", _pickled({"state_dict": content}))
        archive.writestr("archive/byteorder", b"little")
        for name, array in arrays.items():
            archive.writestr(f"archive/data/{name}", array.tobytes())
    (place / "zip.th").write_bytes(out.getvalue())
    yield place / "zip.th"
    begin = _pickled(1001) + _pickled({"little_endian": True, "type_sizes": {"int": 4}})
    parts = [struct.pack("<Q", a.size) + a.tobytes() for a in arrays.values()]
    legacy = LEGACY + begin + _pickled(content, None) + _pickled(list(arrays)) + b"".join(parts)
    (place / "legacy.th").write_bytes(legacy)
    yield place / "legacy.th"


def _pickled(content: Any, *view: Any) -> bytes:
    torch, utils = types.ModuleType("torch"), types.ModuleType("torch._utils")
    for kind in ("FloatStorage", "LongStorage"):
        setattr(torch, kind, type(kind, (), {"__module__": "torch"}))

    def rebuild() -> None:
        raise AssertionError("only its name is written")

    rebuild.__module__, rebuild.__qualname__ = "torch._utils", "_rebuild_tensor_v2"
    utils.rebuild = utils._rebuild_tensor_v2 = rebuild  # type: ignore[attr-defined]

    class Pickler(pickle.Pickler):
        def persistent_id(self, obj: Any) -> Any:
            if isinstance(obj, _Storage):
                return ("storage", getattr(torch, obj.kind), obj.key, "cpu", obj.length, *view)
            return None

    stream = io.BytesIO()
    sys.modules |= {"torch": torch, "torch._utils": utils}
    try:
        Pickler(stream, 2).dump(content)
    finally:
        del sys.modules["torch"], sys.modules["torch._utils"]
    return stream.getvalue()


def _packed_model(path: Path) -> Any:
    return load_model(path, weights="packed")


READERS: Final = {
    "safetensors": Reader(_dense, load_model),
    "huggingface": Reader(_huggingface, load_model),
    "gguf": Reader(_gguf, _packed_model),
    "torch": Reader(_torch, read_tensors),
    "checkpoint": Reader(_checkpoints, lambda path: lb.checkpoint.load(path, verify=True)),
    "gptq": Reader(_folders("gptq", "w4a16_g32", "w3a16", "w4a16_g32_asym"), _packed_model),
    "awq": Reader(_folders("awq", "w4a16_g32", "w4a16_g32_asym"), _packed_model),
    "compressed-tensors": Reader(
        _folders("compressed-tensors", "w4a16_g32", "w4a16_g32_asym", "w8a8", "nvfp4a16", "mxfp4"),
        _packed_model,
    ),
    "bitnet": Reader(_folders("bitnet", "w1_58a8"), _packed_model),
    "bitsandbytes": Reader(_bitsandbytes, _packed_model),
}
