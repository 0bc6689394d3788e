"""The split and the fingerprint: decided by names and contents, by nothing else."""

import hashlib

import pytest

from lowbit_jax.data.corpus import Corpus, choose_valid, fingerprint

NAMES = [f"file{i}.py" for i in range(2000)]


def test_split_is_the_hash_of_the_name():
    # Written out for two names, so that a change of the rule, which moves text between the splits
    # of every run so far, cannot pass.
    def fraction(name):
        return int(hashlib.sha256(name.encode()).hexdigest()[:16], 16) / 2**64

    chosen = choose_valid(NAMES, 0.05, source="test")
    assert chosen == [fraction(name) < 0.05 for name in NAMES]
    # 2000 draws at 5 %: 100 expected, a standard deviation of 9.7; within 5 of them.
    assert abs(sum(chosen) - 100) < 5 * 9.7


def test_a_new_file_moves_no_other_file():
    before = dict(zip(NAMES, choose_valid(NAMES, 0.05, source="test"), strict=True))
    more = [*reversed(NAMES), "another.py"]
    after = dict(zip(more, choose_valid(more, 0.05, source="test"), strict=True))
    assert all(after[name] == valid for name, valid in before.items())


@pytest.mark.parametrize("fraction", [1e-9, 1 - 1e-9])
def test_neither_side_is_empty_when_two_units_exist(fraction):
    assert sorted(choose_valid(["a", "b", "b"], fraction, source="test")) in (
        [False, False, True],
        [False, True, True],
    )


def test_one_unit_cannot_be_split():
    with pytest.raises(ValueError, match=r"text:x: the corpus has 1 separate piece.*at least 2"):
        choose_valid(["a", "a"], 0.05, source="text:x")


def test_fingerprint_sees_names_texts_splits_order_and_separator():
    records = [("train", "a", "one"), ("valid", "b", "two")]
    variants = [
        (records, "\n"),
        (records, "\n\n"),
        (records[::-1], "\n"),
        ([("valid", "a", "one"), records[1]], "\n"),
        ([("train", "ao", "ne"), records[1]], "\n"),
        ([("train", "a", "One"), records[1]], "\n"),
    ]
    digests = {fingerprint(r, separator) for r, separator in variants}
    assert len(digests) == len(variants)
    assert fingerprint(iter(records), "\n") == fingerprint(records, "\n")


def test_corpus_counts_bytes_not_characters():
    corpus = Corpus("test", train=("é", "b"), valid=("c",), separator="\n", sha256="0" * 64)
    assert corpus.byte_count("train") == len("é\nb\n".encode()) == 5
    assert corpus.summary()["bytes"] == {"train": 5, "valid": 2}
    assert "2 training documents (5 bytes)" in str(corpus)
    with pytest.raises(ValueError, match="unknown split 'test'"):
        corpus.documents("test")
