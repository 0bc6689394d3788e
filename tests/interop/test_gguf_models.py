"""A GGUF file becomes the model that it is of."""

import contextlib
import dataclasses

import hypothesis
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from lowbit_jax.evaluation.losses import token_nll
from lowbit_jax.generation import generate
from lowbit_jax.interop import load_model
from lowbit_jax.interop.gguf import GGUFFile
from lowbit_jax.interop.gguf_models import half_split
from lowbit_jax.models import DecoderConfig

BASE = DecoderConfig(
    vocab=11,
    dim=8,
    layers=2,
    heads=2,
    kv_heads=1,
    ffn_dim=12,
    max_length=16,
    norm_eps=2.0**-17,
    head_dim=6,
    rope_theta=512.0,
)
GEMMA = dataclasses.replace(
    BASE,
    tied=True,
    activation="gelu_tanh",
    embed_scale=8**0.5,
    post_norm=True,
    query_scale=6**-0.5,
)
# By architecture: what its file's metadata and tensors have to become.
CONFIGS = {
    "llama": dataclasses.replace(BASE, rope_factors=(1.0, 2.0, 8.0), windows=(4, 4)),
    "qwen2": dataclasses.replace(BASE, qkv_bias=True, tied=True),
    "qwen3": dataclasses.replace(BASE, qk_norm=True, rope_factors=(4.0,) * 3),
    "gemma2": dataclasses.replace(
        GEMMA, attention_softcap=50.0, logit_softcap=32.0, windows=(4, 0)
    ),
    "gemma3": dataclasses.replace(GEMMA, qk_norm=True, windows=(4, 4), local_rope_theta=10000.0),
}
EXTRA = {
    "llama": {"attention.sliding_window": 4},
    "qwen2": {},
    "qwen3": {"rope.scaling.type": "linear", "rope.scaling.factor": 4.0},
    "gemma2": {
        "attention.sliding_window": 4,
        "attn_logit_softcapping": 50.0,
        "final_logit_softcapping": 32.0,
    },
    "gemma3": {"attention.sliding_window": 4},
}
NAMES = {
    "embed/embedding": "token_embd.weight",
    "norm/scale": "output_norm.weight",
    "head/kernel": "output.weight",
    "attention_norm/scale": "attn_norm.weight",
    "attention/query/kernel": "attn_q.weight",
    "attention/query/bias": "attn_q.bias",
    "attention/key/kernel": "attn_k.weight",
    "attention/key/bias": "attn_k.bias",
    "attention/value/kernel": "attn_v.weight",
    "attention/value/bias": "attn_v.bias",
    "attention/query_norm/scale": "attn_q_norm.weight",
    "attention/key_norm/scale": "attn_k_norm.weight",
    "attention/out/kernel": "attn_output.weight",
    "attention_post_norm/scale": "post_attention_norm.weight",
    "mlp_norm/scale": "ffn_norm.weight",
    "mlp_post_norm/scale": "post_ffw_norm.weight",
    "mlp/gate/kernel": "ffn_gate.weight",
    "mlp/up/kernel": "ffn_up.weight",
    "mlp/down/kernel": "ffn_down.weight",
}


def interleave(rows: np.ndarray, heads: int) -> np.ndarray:
    """From "rotate half" to the paper's order: row by row, as llama.cpp stores it."""
    out, width = np.empty_like(rows), len(rows) // heads
    for head in range(heads):
        for i in range(width // 2):
            for part in (0, 1):
                out[head * width + 2 * i + part] = rows[head * width + i + part * width // 2]
    return out


def file_of(files, architecture, leaves, config, metadata=(), drop=()) -> bytes:
    tensors = {}
    for path, value in leaves.items():
        number = path.split("/")[1] if path.startswith("layers/") else None
        name = NAMES[path.split("/", 2)[2] if number else path]
        value = value.T if path.endswith("kernel") else value
        if architecture == "llama" and ("query" in path or "key" in path):
            value = interleave(value, config.heads if "query" in path else config.kv_heads)
        name = f"blk.{number}.{name}" if number else name
        tensors[name] = ("F32", value.shape, np.ascontiguousarray(value).tobytes())
    if architecture == "llama":
        factors = np.float32(config.rope_factors or [1] * (config.head_size // 2))
        tensors["rope_freqs.weight"] = ("F32", factors.shape, factors.tobytes())
    own = {
        "block_count": config.layers,
        "embedding_length": config.dim,
        "attention.head_count": config.heads,
        "attention.head_count_kv": config.kv_heads,
        "feed_forward_length": config.ffn_dim,
        "context_length": config.max_length,
        "attention.layer_norm_rms_epsilon": config.norm_eps,
        "rope.freq_base": 512.0,
        "attention.key_length": 6,
        "attention.value_length": 6,
        "rope.dimension_count": 6,
        **EXTRA[architecture],
        **dict(metadata),
    }
    everything = {"general.architecture": architecture}
    everything |= {f"{architecture}.{k}": v for k, v in own.items() if v is not None}
    return files.gguf(everything, {n: t for n, t in tensors.items() if n not in drop})


@pytest.mark.parametrize("architecture", CONFIGS)
def test_configuration_and_weights_come_back_bit_for_bit(files, save, architecture):
    config = CONFIGS[architecture]
    leaves = files.random_leaves(config)
    loaded = load_model(save(file_of(files, architecture, leaves, config)))
    assert loaded.model.config == config
    got = files.leaves_of(loaded.model)
    assert list(got) == list(leaves)
    for path, value in leaves.items():
        np.testing.assert_array_equal(got[path], value, err_msg=path)
    assert loaded.tokenizer is None
    assert loaded.source["format"] == "gguf"
    assert loaded.source["architecture"] == architecture


def test_rows_are_put_back_where_rotate_half_wants_them():
    rows = np.arange(24, dtype=np.float32).reshape(12, 2)
    np.testing.assert_array_equal(half_split(interleave(rows, 2), 2), rows)
    np.testing.assert_array_equal(half_split(interleave(rows[:, 0], 3), 3), rows[:, 0])


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"metadata": {"block_count": 3}}, ValueError, r"says 3 layers, .* tensors of 2"),
        ({"metadata": {"block_count": 2**32 - 1}}, ValueError, r"says 4294967295 layers"),
        ({"metadata": {"block_count": "two"}}, ValueError, r"block_count is 'two', and not"),
        ({"metadata": {"embedding_length": None}}, ValueError, r"embedding_length is missing"),
        ({"metadata": {"embedding_length": 16}}, ValueError, r"token_embd.weight is \(11, 8\)"),
        (
            {"metadata": {"attention.head_count": 3}},
            ValueError,
            r"blk.0.attn_q.weight is \(12, 8\)",
        ),
        (
            {"metadata": {"feed_forward_length": 2**32 - 1}},
            ValueError,
            r"blk.0.ffn_up.weight is \(12, 8\) and not \(4294967295, 8\)",
        ),
        (
            {"metadata": {"attention.key_length": 2**32 - 2, "rope.scaling.type": "linear"}},
            ValueError,
            r"blk.0.attn_q.weight is \(12, 8\) and not \(8589934588, 8\)",
        ),
        ({"metadata": {"expert_count": 8}}, NotImplementedError, r"expert_count is 8"),
        (
            {"metadata": {"feed_forward_length": np.arange(2, dtype=np.int32)}},
            NotImplementedError,
            r"layers of different sizes",
        ),
        ({"metadata": {"rope.dimension_count": 4}}, NotImplementedError, r"dimension_count is 4"),
        ({"metadata": {"rope.scaling.type": "yarn"}}, NotImplementedError, r"'yarn'"),
        ({"drop": ["blk.1.ffn_up.weight"]}, ValueError, r"1 tensors are missing .*blk.1.ffn_up"),
        ({"drop": ["token_embd.weight"]}, ValueError, r"no matrix token_embd.weight"),
        ({"drop": ["blk.0.attn_q.bias"]}, ValueError, r"attn_k.bias.*no parameter|belong to no"),
    ],
)
def test_a_file_that_contradicts_itself_is_named(files, save, changes, error, message):
    config = CONFIGS["qwen2"]
    leaves = files.random_leaves(config)
    with pytest.raises(error, match=message):
        load_model(save(file_of(files, "qwen2", leaves, config, **changes)))


@hypothesis.settings(max_examples=30)
@given(data=st.data())
def test_a_changed_header_is_an_error_or_a_model(files, tmp_path_factory, data):
    config = CONFIGS["llama"]
    content = bytearray(file_of(files, "llama", files.random_leaves(config), config))
    header = content.index(b"rope_freqs.weight")
    for _ in range(data.draw(st.integers(1, 2))):
        content[data.draw(st.integers(0, header))] = data.draw(st.integers(0, 255))
    path = tmp_path_factory.getbasetemp() / "changed.gguf"
    path.write_bytes(content)
    with contextlib.suppress(ValueError, NotImplementedError):
        loaded = load_model(path)
        assert len(loaded.model.layers) == config.layers


def test_a_tokenizer_larger_than_the_embedding_is_an_error(files, save):
    config = CONFIGS["llama"]
    content = file_of(files, "llama", files.random_leaves(config), config)
    tokens = {
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.tokens": [chr(97 + i) for i in range(12)],
        "tokenizer.ggml.merges": [],
    }
    pairs = b"".join(files.gguf_pair(key, value) for key, value in tokens.items())
    # Behind the counts; the data moves by a whole number of alignments.
    pad = files.gguf_pair("pad", "")
    pairs += files.gguf_pair("pad", " " * (-(len(pairs) + len(pad)) % 32))
    count = bytes([content[16] + 4])
    with pytest.raises(ValueError, match=r"tokenizer has 12 tokens, and the embedding only 11"):
        load_model(save(content[:16] + count + content[17:24] + pairs + content[24:]))


def test_an_unknown_architecture_lists_the_known_ones(files, save):
    with pytest.raises(
        NotImplementedError, match=r"'mamba' is not supported. Supported: \['gemma2"
    ):
        load_model(save(files.gguf({"general.architecture": "mamba"}, {})))
    with pytest.raises(ValueError, match=r"general.architecture is missing"):
        load_model(save(files.gguf({}, {})))


@pytest.fixture(scope="module")
def stories(assets):
    return load_model(assets / "stories260k" / "stories260K.gguf")


def test_stories260k_begins_as_its_readme_says(stories):
    bos = stories.tokenizer.bos
    tokens = generate(stories.model, np.array([[bos]]), 200)[0]
    text = stories.tokenizer.decode(np.concatenate([[bos], tokens]))
    assert text.startswith("Once upon a time, there was a little girl named Lily.")


def test_stories260k_computes_the_papers_rotation(stories, assets):
    """Against the file's own rows, float64, with pairs 2 i and 2 i + 1 (Eq. 34 of 2104.09864)."""
    file = GGUFFile(assets / "stories260k" / "stories260K.gguf")
    weights = {name: file.read(name).astype(np.float64) for name in file.tensors}
    tokens = stories.tokenizer.encode("Once upon a time, there was a dog. He ran.")
    angles = np.arange(len(tokens))[:, None] * 10000.0 ** (-np.arange(0, 8, 2) / 8)
    cos, sin = np.cos(angles)[:, None], np.sin(angles)[:, None]

    def norm(x, name):
        return x / np.sqrt(np.mean(x**2, -1, keepdims=True) + 1e-5) * weights[name]

    def rotate(x):
        even, odd = x[..., 0::2], x[..., 1::2]
        return np.stack([even * cos - odd * sin, even * sin + odd * cos], -1).reshape(x.shape)

    x = weights["token_embd.weight"][tokens]
    for i in range(5):
        layer = {n.split(".")[2]: w for n, w in weights.items() if n.startswith(f"blk.{i}.")}
        h = norm(x, f"blk.{i}.attn_norm.weight")
        heads = [h @ layer[n].T for n in ("attn_q", "attn_k", "attn_v")]
        q, k, v = (part.reshape(len(tokens), -1, 8) for part in heads)
        k, v = np.repeat(rotate(k), 2, 1), np.repeat(v, 2, 1)
        scores = np.einsum("thd,shd->hts", rotate(q), k) / np.sqrt(8)
        scores = np.where(np.tri(len(tokens), dtype=bool), np.exp(scores), 0)
        y = np.einsum("hts,shd->thd", scores / scores.sum(-1, keepdims=True), v)
        x = x + y.reshape(len(tokens), 64) @ layer["attn_output"].T
        h = norm(x, f"blk.{i}.ffn_norm.weight")
        gate = h @ layer["ffn_gate"].T
        x = x + (gate / (1 + np.exp(-gate)) * (h @ layer["ffn_up"].T)) @ layer["ffn_down"].T
    want = norm(x, "output_norm.weight") @ weights["output.weight"].T
    got = stories.model(jnp.asarray(tokens)[None])[0]
    # 7 products of up to 172 terms a layer and the head; see test_decoder.
    atol = (7 * 5 + 1) * 172 * np.finfo(np.float32).eps * np.max(np.abs(want))
    np.testing.assert_allclose(got, want, rtol=0, atol=atol)


def test_stories260k_predicts_tinystories_as_a_plain_forward_does(stories, assets):
    """Each story with BOS, cut to 256 tokens.

    A float64 forward in numpy over the file's own tensors, in the form of the test above, gives
    1.5226475 nats a token over the first 20 stories (and 1.5452695 over all 300).
    """
    text = (assets / "tinystories" / "valid.txt").read_text()
    rows, tokenizer = [], stories.tokenizer
    for story in text.split("<|endoftext|>")[:20]:
        rows.append(np.concatenate([[tokenizer.bos], tokenizer.encode(story.strip())])[:256])
    padded = np.zeros((20, 256), np.int32)
    for row, tokens in zip(padded, rows, strict=True):
        row[: len(tokens)] = tokens
    nll = jax.jit(lambda model, x: token_nll(model(x[:, :-1]), x[:, 1:]))(stories.model, padded)
    nll = [row[: len(tokens) - 1] for row, tokens in zip(np.asarray(nll), rows, strict=True)]
    # float32 logits of size 20 after 36 products err by some 1e-5 each, and their mean by less.
    assert np.mean(np.concatenate(nll), dtype=np.float64) == pytest.approx(1.5226475, abs=1e-5)
