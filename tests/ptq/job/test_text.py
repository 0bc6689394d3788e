import numpy as np
import pytest

from lowbit_jax.data import ByteTokenizer
from lowbit_jax.ptq.job.config import CalibrationConfig, EvaluationConfig
from lowbit_jax.ptq.job.text import load_texts

SEPARATOR = "<|endoftext|>"


@pytest.fixture
def three(tmp_path):
    path = tmp_path / "three.txt"
    path.write_text(f"  abcd\n{SEPARATOR}\n{SEPARATOR}ef {SEPARATOR}ghijkl")
    return path


def load(path, tokenizer, separator=SEPARATOR, vocab=257, **changes):
    fields = {"source": f"text:{path}", "separator": separator}
    calibration = {k.removeprefix("c_"): v for k, v in changes.items() if k.startswith("c_")}
    evaluation = {k.removeprefix("e_"): v for k, v in changes.items() if k.startswith("e_")}
    return load_texts(
        CalibrationConfig(**fields | {"sequences": 2} | calibration),
        EvaluationConfig(**fields | evaluation),
        tokenizer,
        vocab=vocab,
        max_length=8,
        default_length=4,
    )


def characters(tokens):
    return "".join("^" if t == 256 else chr(t) for t in np.ravel(tokens))


def test_calibration_joins_stripped_documents_behind_the_begin_token(three, begin):
    texts = load(three, begin, c_sequences=3, c_batch=2)
    assert [batch.shape for batch in texts.calibration] == [(2, 4), (1, 4)]
    assert characters(np.concatenate(texts.calibration)) == "^abcd^ef^ghi"
    limited = load(three, begin, c_documents=2, c_length=3)
    assert characters(np.concatenate(limited.calibration)) == "^abcd^"


def test_evaluation_cuts_each_document_and_counts_every_token_behind_its_begin(three, begin):
    ((tokens, mask),) = load(three, begin, e_batch=4).evaluation
    assert tokens.shape == (3, 4)
    rows = [
        characters(row[:1]) + characters(row[1:][m]) for row, m in zip(tokens, mask, strict=True)
    ]
    assert rows == ["^abc", "^ef", "^ghi"]
    assert mask.sum() == 3 + 2 + 3


def test_without_a_begin_token_windows_predict_every_token_but_the_first_once(three):
    texts = load(three, ByteTokenizer(), e_batch=2)
    predicted = "".join(
        characters(row[1:][m]) for batch in texts.evaluation for row, m in zip(*batch, strict=True)
    )
    assert predicted == f"abcd{SEPARATOR}ef{SEPARATOR}ghijkl{SEPARATOR}"[1:]
    assert {tokens.shape for tokens, _ in texts.evaluation} == {(2, 5)}


def test_a_part_of_the_evaluation_lies_evenly_over_the_text(three, begin):
    ((tokens, mask),) = load(three, begin, e_sequences=2, e_batch=2).evaluation
    assert [characters(row[:2]) for row in tokens] == ["^a", "^e"]
    assert mask.sum() == 3 + 2


def test_fingerprints_follow_the_tokens(three, begin):
    first, again = load(three, begin), load(three, begin, c_batch=1)
    other = load(three, begin, c_length=3)
    assert first.calibration_sha256 == again.calibration_sha256 != other.calibration_sha256
    assert first.evaluation_sha256 == again.evaluation_sha256


def test_a_corpus_calibrates_on_its_training_split(tmp_path):
    for name in "abcdefgh":
        (tmp_path / f"{name}.txt").write_text(f"the text of {name}\n" * 30)
    fields = {"source": f"text:{tmp_path}/*.txt"}
    texts = load_texts(
        CalibrationConfig(sequences=4, **fields),
        EvaluationConfig(**fields),
        ByteTokenizer(),
        vocab=256,
        max_length=64,
        default_length=16,
    )
    assert characters(texts.calibration[0]).startswith("the text of a")
    assert sum(int(mask.sum()) for _, mask in texts.evaluation) == 8 * 30 * 14 - 1


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"c_sequences": 5},
            r"3 documents give 15 tokens, and 5 sequences of 4 take 20.*sequences=3",
        ),
        ({"c_length": 9}, r"calibration\.length=9 is longer than the model's context of 8"),
        ({"e_length": 9}, r"evaluation\.length=9 is longer"),
        ({"vocab": 200}, r"calibration: token 256 is outside the model's vocabulary \[0, 200\)"),
        ({"c_source": "nowhere:x"}, "unknown source 'nowhere:x'"),
    ],
)
def test_wrong_texts_say_what_there_is_and_what_is_needed(three, begin, changes, message):
    with pytest.raises(ValueError, match=message):
        load(three, begin, **changes)


def test_a_missing_text_names_the_pattern(tmp_path, begin):
    with pytest.raises(FileNotFoundError, match=r"none\.txt: matches no file"):
        load(tmp_path / "none.txt", begin)
