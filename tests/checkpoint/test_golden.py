"""Every schema that was ever written loads for ever: a checkpoint of each lies in tests/golden.

They were written once by the version that had the schema, and are not made anew: what they hold is
listed in digests.json beside them, from the arrays in memory.
"""

import hashlib
import json
from pathlib import Path

import jax
import numpy as np
import pytest
from flax import nnx

import lowbit_jax as lb

GOLDEN = Path(__file__).parents[1] / "golden" / "checkpoints"


def listed(model):
    leaves, _ = jax.tree_util.tree_flatten_with_path(nnx.state(model))
    return {
        jax.tree_util.keystr(path, simple=True, separator="/"): [
            str(x.dtype),
            list(x.shape),
            hashlib.sha256(np.asarray(x).tobytes()).hexdigest(),
        ]
        for path, x in leaves
    }


@pytest.mark.parametrize("schema", range(1, lb.checkpoint.SCHEMA + 1))
@pytest.mark.parametrize("kind", ["packed", "train"])
def test_a_checkpoint_of_every_schema_loads_bit_for_bit(schema, kind):
    folder = GOLDEN / f"schema_{schema}"
    manifest = lb.checkpoint.read_manifest(folder / kind)
    assert (manifest["schema"], manifest["kind"]) == (schema, kind)
    loaded = lb.checkpoint.load(folder / kind, verify=schema > 1)
    assert listed(loaded) == json.loads((folder / "digests.json").read_text())[kind]
    assert lb.recipe_of(loaded) == lb.Recipe.from_json(json.dumps(manifest["recipe"]))


def test_schema_1_has_nothing_to_verify():
    with pytest.raises(NotImplementedError, match="schema 1 kept no digests"):
        lb.checkpoint.load(GOLDEN / "schema_1" / "packed", verify=True)


def test_schema_2_is_plain_files():
    """The promise without this library: zarr's header, and little-endian numbers in C order."""
    folder = GOLDEN / "schema_2" / "packed"
    manifest = json.loads((folder / "manifest.json").read_text())
    name = "layers/0/attention/query/kernel"  # 3 bits: planes of 2 and 1
    entry = manifest["tensors"][name]
    k, n = entry["shape"]
    codes = np.zeros((k, n), np.uint8)
    for plane, (width, shift) in {"words_0": (2, 0), "words_1": (1, 2)}.items():
        array = folder / manifest["arrays"] / f"{name.replace('/', '.')}.{plane}"
        header = json.loads((array / ".zarray").read_text())
        assert (header["dtype"], header["compressor"]) == ("<i4", None)
        raw = (array / "0.0").read_bytes()
        assert hashlib.sha256(raw).hexdigest() == entry["sha256"][plane]
        words = np.frombuffer(raw, "<u4").reshape(header["shape"])
        for row in range(k):
            per_word = 32 // width
            field = words[row // per_word] >> (width * (row % per_word)) & (2**width - 1)
            codes[row] |= (field << shift).astype(np.uint8)
    q = lb.checkpoint.load(folder).layers[0].attention.query.kernel[...]
    np.testing.assert_array_equal(codes, q.codes())
