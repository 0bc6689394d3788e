import math

import numpy as np
import pytest
from flax import nnx

from lowbit_jax.data import SubwordTokenizer
from lowbit_jax.data.corpus import Corpus
from lowbit_jax.data.tokenizers import train_bpe
from lowbit_jax.models import Decoder, DecoderConfig
from lowbit_jax.training.runs import Loaded
from lowbit_jax.training.scoring import score


@pytest.fixture
def loaded(tmp_path):
    corpus = Corpus("made up", ("<s>",), ("x",), "<s>", "")
    definition = train_bpe(corpus, 257).definition
    number = SubwordTokenizer(definition).encode("<s>")[0]
    tokenizer = SubwordTokenizer(definition, bos=int(number))
    config = DecoderConfig(
        vocab=257, dim=8, layers=1, heads=2, kv_heads=1, ffn_dim=8, max_length=16
    )
    model = Decoder(config, rngs=nnx.Rngs(0))
    (tmp_path / "text.txt").write_text("first|second one|\n|a third and longer document")
    metadata = {
        "tokenizer": tokenizer.to_json(),
        "length": 8,
        "separator": "|",
        "config": {"evaluation": {"source": f"text:{tmp_path}/text.txt"}},
    }
    return Loaded(tmp_path, model, metadata)


def test_a_model_with_a_begin_token_reads_each_document_from_its_begin(loaded):
    result = score(loaded)
    assert (result.length, result.source) == (8, loaded.metadata["config"]["evaluation"]["source"])
    tokenizer, total, count = loaded.tokenizer(), 0.0, 0
    for text in ("first", "second one", "a third and longer document"):
        tokens = np.array([tokenizer.bos, *tokenizer.encode(text)], np.int32)[:8]
        logits = np.asarray(loaded.model(tokens[None, :-1])[0], np.float64)
        log_p = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
        total -= sum(log_p[i, token] for i, token in enumerate(tokens[1:]))
        count += len(tokens) - 1
    assert result.tokens == count == 5 + 7 + 7
    # Nineteen float32 terms of about 5.5.
    assert result.nll == pytest.approx(total / count, abs=1e-5)
    assert result.ppl == pytest.approx(math.exp(result.nll))
    # One byte a token.
    assert result.bits_per_byte == pytest.approx(result.nll / math.log(2))


def test_a_part_of_the_documents_and_another_separator(loaded):
    assert score(loaded, max_windows=2).tokens == 5 + 7
    assert score(loaded, separator="no such").tokens == 7
