"""Datasets from folders as they are on disk, and the errors of a machine without a network."""

import datasets
import pytest

from lowbit_jax.data import load_corpus
from lowbit_jax.data import tokenize as tokenize_corpus
from lowbit_jax.data.tokenizers import ByteTokenizer

ROWS = [f"row {i}" for i in range(60)]


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    datasets.disable_progress_bars()
    yield
    datasets.enable_progress_bars()


def dataset(rows=ROWS, column="text", **columns):
    return datasets.Dataset.from_dict({column: rows, **columns})


def test_saved_splits_are_used_as_they_are(tmp_path):
    splits = datasets.DatasetDict(train=dataset(), validation=dataset(["v1", "v2"]))
    splits.save_to_disk(tmp_path / "saved")
    corpus = load_corpus(f"hf:{tmp_path}/saved")
    assert (list(corpus.train), list(corpus.valid)) == (ROWS, ["v1", "v2"])
    text = "".join(f"{row}\n\n" for row in ROWS)
    tokens = tokenize_corpus(corpus, ByteTokenizer())
    assert tokens.tobytes() == text.encode()


def test_one_split_is_divided_by_a_hash(tmp_path):
    dataset().save_to_disk(tmp_path / "saved")
    corpus, again = (load_corpus(f"hf:{tmp_path}/saved", valid_fraction=0.2) for _ in range(2))
    assert sorted([*corpus.train, *corpus.valid]) == sorted(ROWS)
    # 60 draws at 20 %: 12 expected, a standard deviation of 3.1; within 3 of them.
    assert abs(len(corpus.valid) - 12) <= 9
    assert list(corpus.valid) == list(again.valid)
    assert corpus.sha256 == again.sha256


def test_parquet_files_are_split_by_their_names(tmp_path):
    folder = tmp_path / "data"
    folder.mkdir()
    dataset().to_parquet(folder / "my-train.parquet")
    dataset(["v1", "v2"]).to_parquet(folder / "my-validation.parquet")
    corpus = load_corpus(f"hf:{folder}")
    assert (list(corpus.train), list(corpus.valid)) == (ROWS, ["v1", "v2"])


def test_blank_and_missing_rows_are_left_out(tmp_path):
    rows = ["a", "", None, "  \n", "b"]
    splits = datasets.DatasetDict(train=dataset(rows), valid=dataset(["v", ""]))
    splits.save_to_disk(tmp_path / "saved")
    corpus = load_corpus(f"hf:{tmp_path}/saved")
    assert (list(corpus.train), list(corpus.valid)) == (["a", "b"], ["v"])


def test_the_only_string_column_is_the_text(tmp_path):
    dataset(column="story", score=list(range(60))).save_to_disk(tmp_path / "saved")
    assert sorted(load_corpus(f"hf:{tmp_path}/saved").train)[0] == "row 0"


def test_an_unclear_text_column_lists_the_columns(tmp_path):
    dataset(column="title", body=ROWS, score=list(range(60))).save_to_disk(tmp_path / "saved")
    with pytest.raises(ValueError, match=r"which column is the text.*title.*body.*score"):
        load_corpus(f"hf:{tmp_path}/saved")


def test_without_a_training_split_the_splits_are_listed(tmp_path):
    splits = datasets.DatasetDict(test=dataset(), validation=dataset())
    splits.save_to_disk(tmp_path / "saved")
    with pytest.raises(ValueError, match=r"none of the splits \['test', 'validation'\] is 'train'"):
        load_corpus(f"hf:{tmp_path}/saved")


def test_an_empty_validation_split_is_an_error_with_numbers(tmp_path):
    splits = datasets.DatasetDict(train=dataset(), validation=dataset([""]))
    splits.save_to_disk(tmp_path / "saved")
    with pytest.raises(ValueError, match=r"60 training and 0 validation rows"):
        load_corpus(f"hf:{tmp_path}/saved")


def test_a_missing_folder_is_not_looked_for_on_the_hub(tmp_path):
    with pytest.raises(FileNotFoundError, match="no folder"):
        load_corpus(f"hf:{tmp_path}/missing")


@pytest.mark.parametrize(
    ("raised", "message"),
    [
        (ConnectionError("no route"), r"hub cannot be reached \(no route\).*text:GLOB or stdlib"),
        (ValueError("BuilderConfig 'b' not found. Available: ['c']"), r"hf:org/a:b: .*\['c'\]"),
        (FileNotFoundError("Dataset 'org/a' doesn't exist"), r"hf:org/a:b: .*doesn't exist"),
    ],
    ids=["no network", "no such configuration", "no such dataset"],
)
def test_what_the_hub_says_comes_with_the_source(monkeypatch, raised, message):
    asked = []

    def load_dataset(name, config):
        asked.append((name, config))
        raise raised

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    with pytest.raises(type(raised), match=message):
        load_corpus("hf:org/a:b")
    assert asked == [("org/a", "b")]


def test_real_parquet_of_c4(assets):
    corpus = load_corpus(f"hf:{assets}/c4_mini")
    assert (len(corpus.train), len(corpus.valid)) == (200, 40)
